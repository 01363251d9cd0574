"""Damaged and hostile folders are refused within seconds, and in little memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.pretrained.convert import convert
from model.pretrained.source import PretrainedError
from model.run import load_checkpoint
from tests.model.pretrained.folders import tensors, write

pytestmark = pytest.mark.timeout(20)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(PretrainedError, match=message):
        convert(folder, folder.with_name("run"))
    assert not folder.with_name("run").exists()


def test_a_header_of_four_gigabytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 32))
        file.truncate(5 << 30)  # sparse: it takes no room
    refuse(folder, r"begins with a header of 4,294,967,296 bytes; the limit is 33,554,432")


@pytest.mark.parametrize("kept", [0, 7, 30, 900, -1])
def test_a_file_cut_short(kept: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    refuse(folder, r"model.safetensors is damaged or incomplete")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = tensors()
    del weights["model.layers.1.mlp.up_proj.weight"]
    refuse(write(tmp_path / "tiny", weights), r"lacks the tensor model.layers.1.mlp.up_proj.weight")


def test_sizes_that_do_not_fit_are_found_before_any_is_allocated(tmp_path: Path) -> None:
    sizes = {"vocab_size": 2**24, "hidden_size": 2**20, "head_dim": 2**16}
    folder = write(tmp_path / "tiny", tensors(), **sizes)
    refuse(folder, r"embed_tokens.weight has shape 11x16, and .* say 16777216x1048576")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    refuse(write(tmp_path / "tiny", weights), "lm_head.weight is stored as int8: only float32")


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "pickled weights, which can run code: save it as safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json: it is not a whole model"),
        ("[]", "config.json is not a JSON object"),
        ('{"model_type": ', "config.json cannot be read"),
        ("[" * 100_000, "config.json cannot be read"),
        ("[" + " " * (33 << 20), "bytes, the limit is 33,554,432"),
    ],
)
def test_settings_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', which is"),
        ({"weight_map": {"a": "model.bin"}}, "names 'model.bin', which is no file of the folder"),
        ({"weight_map": {"a": "b.safetensors"}}, "has no b.safetensors, which .* names"),
    ],
)
def test_an_index_that_leads_nowhere(
    listed: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "tiny")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    refuse(folder, message)


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "nothing is neither the folder of a model nor a .gguf file")


def test_shards_in_any_order(tmp_path: Path) -> None:
    folder, weights = write(tmp_path / "tiny"), tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for shard in ("a", "b"):
        part = {name: weights[name] for name in names["ab".index(shard) :: 2]}
        save_file(part, folder / f"{shard}.safetensors")
    listed = {name: "ab"[at % 2] + ".safetensors" for at, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    convert(folder, tmp_path / "run")
    convert(write(tmp_path / "whole"), tmp_path / "other")
    one, other = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("run", "other"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
