"""A converted model computes what transformers computes with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from model.pretrained.convert import convert
from model.run import load_checkpoint
from tests.model.pretrained.architectures import ARCHITECTURES, make, save

LENGTH, TOLERANCE = 128, 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    convert(save(theirs, tmp_path / "hf"), tmp_path / "run")
    ours = load_checkpoint(tmp_path / "run").model
    tokens = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_shards_are_one_model(tmp_path: Path) -> None:
    theirs = make("llama")
    folder = save(theirs, tmp_path / "hf", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    convert(folder, tmp_path / "run")
    tokens = torch.arange(40)[None]
    ours = load_checkpoint(tmp_path / "run").model
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_of_two_bytes_keep_their_values(kind: torch.dtype, tmp_path: Path) -> None:
    folder = save(make("qwen2").to(kind), tmp_path / "hf")
    convert(folder, tmp_path / "run")
    tokens = torch.arange(40)[None]
    ours = load_checkpoint(tmp_path / "run").model
    theirs = tf.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.eval()(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=TOLERANCE)
