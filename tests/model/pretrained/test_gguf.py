"""GGUF files: every supported type, the order of heads, and files that lie."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from model.pretrained.convert import convert
from model.pretrained.gguf_file import open_gguf, read_tensor
from model.pretrained.gguf_header import Stored, read_header
from model.pretrained.source import PretrainedError
from model.run import load_checkpoint
from tests.model.pretrained.folders import tensors, write

pytestmark = pytest.mark.timeout(20)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_TOKENS = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(11)],
}


def theirs(name: str) -> str:
    """The name in a GGUF file."""
    body, _, end = name.rpartition(".")
    if body in NAMES:
        return f"{NAMES[body]}.{end}"
    _, _, layer, part = body.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{end}"


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: the channels of a pair side by side."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    kind: str = "llama",
    weights: dict[str, torch.Tensor] | None = None,
    more: dict[str, np.ndarray[Any, Any]] | None = None,
    vocabulary: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """The model of `folders`, as the converter of llama.cpp writes it.

    `more` are further tensors; `vocabulary` are the fields of its tokenizer; `changes` are those of
    the settings, and None leaves one out.
    """
    writer = gguf.GGUFWriter(path, kind)
    fields = {
        "block_count": 2,
        "context_length": 32,
        "embedding_length": 16,
        "feed_forward_length": 24,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in fields.items():
        if value is not None:
            adds[type(value)](f"{kind}.{name}", value)
    writer.add_string("general.name", "Tiny")
    writer.add_string("general.license", "mit")
    for name, value in (vocabulary or _TOKENS).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            adds[type(value)](name, value)
    for name, weight in (weights or tensors()).items():
        for part, heads in (("q_proj", 2), ("k_proj", 1)):
            if part in name and kind == "llama":
                weight = neighbours(weight, heads)
        writer.add_tensor(theirs(name), weight.numpy())
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def biased() -> dict[str, torch.Tensor]:
    """Weights of a Qwen2, which has biases."""
    weights = tensors()
    for layer in range(2):
        for part, rows in (("q", 16), ("k", 8), ("v", 8)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.bias"
            weights[name] = torch.arange(rows) / rows + layer
    return weights


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_file_is_the_same_model_as_the_folder(kind: str, tmp_path: Path) -> None:
    weights = tensors() if kind == "llama" else biased()
    convert(write(tmp_path / "hf", weights, model_type=kind), tmp_path / "a")
    file = write_gguf(tmp_path / "tiny.gguf", kind, weights)
    origin = convert(file, tmp_path / "b")
    one, other = (load_checkpoint(tmp_path / name) for name in "ab")
    assert other.config.architecture.epsilon == pytest.approx(1e-6)
    same = replace(other.config.architecture, epsilon=1e-6)
    assert replace(other.config, architecture=same) == one.config
    expected = other.model.state_dict()
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert (origin.source, origin.license, origin.architecture) == ("Tiny", "mit", kind)
    assert (origin.begin_token, origin.end_tokens) == (None, (2,))


def by_hand(kind: str, block: bytes) -> list[float]:
    """The numbers of one block, as ggml-quants.c reads it."""
    half = [float(np.frombuffer(block[at : at + 2], np.float16)[0]) for at in (0, 2)]
    if kind == "Q8_0":
        return [half[0] * number for number in struct.unpack("<32b", block[2:])]
    offset, low = (8, 0.0) if kind == "Q4_0" else (0, half[1])
    packed = block[2:] if kind == "Q4_0" else block[4:]
    numbers = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
    return [half[0] * (number - offset) + low for number in numbers]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_blocks_are_read_row_by_row(kind: str, tmp_path: Path) -> None:
    form = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (3, 2 * size), np.uint8)  # scales are small and finite
    stored = Stored(form, (3, 2 * block), 7, raw.size)
    (tmp_path / "file").write_bytes(b"before." + raw.tobytes() + b"behind")
    got = read_tensor(tmp_path / "file", "x", stored)
    assert got.shape == (3, 2 * block) and got.dtype == torch.float32
    for row in range(3):
        if kind.endswith("K"):
            expected = dequantize(raw[row][None], form)[0]
        else:
            parts = [raw[row, at : at + size].tobytes() for at in (0, size)]
            expected = np.float32([number for part in parts for number in by_hand(kind, part)])
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=1e-6, atol=1e-9)
    assert got.unique().numel() > 50


def test_plain_types_keep_their_type(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    for kind, form in (
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
    ):
        raw = values.to(form).view(torch.uint8).numpy().tobytes()
        (tmp_path / kind).write_bytes(raw)
        stored = Stored(GGMLQuantizationType[kind], (2, 2), 0, len(raw))
        got = read_tensor(tmp_path / kind, "x", stored)
        assert got.dtype == form and torch.equal(got, values.to(form))


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    stored = Stored(GGMLQuantizationType.IQ4_XS, (1, 256), 0, 136)
    with pytest.raises(PretrainedError, match="x is stored as IQ4_XS; supported are F32, F16"):
        read_tensor(tmp_path / "any", "x", stored)


def settings(path: Path) -> dict[str, Any]:
    with open_gguf(path) as source:
        return dict(source.settings)


def test_what_has_another_word_here(tmp_path: Path) -> None:
    plain = settings(write_gguf(tmp_path / "a.gguf"))
    assert plain["model_type"] == "llama" and plain["tie_word_embeddings"] is False
    assert plain["vocab_size"] == 11 and "rope_scaling" not in plain
    scaled = settings(
        write_gguf(
            tmp_path / "b.gguf",
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=8,
            attention__sliding_window=5,
        )
    )
    assert scaled["rope_scaling"]["rope_type"] == "yarn"
    assert scaled["rope_scaling"]["original_max_position_embeddings"] == 8
    assert (scaled["model_type"], scaled["sliding_window"]) == ("mistral", 5)


def test_factors_of_the_frequencies_are_a_tensor(tmp_path: Path) -> None:
    factors = np.float32([1, 2, 4, 8])
    file = write_gguf(tmp_path / "tiny.gguf", more={"rope_freqs.weight": factors})
    convert(file, tmp_path / "run")
    rope = load_checkpoint(tmp_path / "run").config.architecture.rope
    assert rope is not None
    plain = [1e4 ** -(pair / 4) for pair in range(4)]
    np.testing.assert_allclose(np.array(plain) / factors, rope.frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "num_experts is 8: llama is a mixture of experts"),
        ({"block_count": None}, "the settings of the model lack num_hidden_layers"),
        ({"attention__key_length": 16, "attention__value_length": 8}, "keys have 16 channels and"),
        ({"rope__scaling__type": "longrope"}, "rope_type is 'longrope'; supported are default"),
        ({"kind": "gemma2"}, "general.architecture is 'gemma2'; of GGUF files, supported are ll"),
        ({"more": {"blk.0.ssm.weight": np.zeros(4, np.float32)}}, "llama does not use: blk.0.ssm"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(PretrainedError, match=message):
        convert(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for kept in (0, 3, 8, 20, 100, 600, 1500, len(content) - 64):
        file.write_bytes(content[:kept])
        with pytest.raises(
            PretrainedError, match=r"cut.gguf (ends within|cannot be read|is not a)"
        ):
            read_header(file)


def lie(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


LONG = struct.pack("<Q", 1 << 60)
NONE, ONE = struct.pack("<Q", 0), struct.pack("<Q", 1)
NAME = ONE + b"x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(40), "has version 9 of GGUF; 2 and 3 are known"),
        (lie(LONG, NONE), "has 1,152,921,504,606,846,976 tensors; the limit is 65,536"),
        (lie(NONE, LONG), "has 1,152,921,504,606,846,976 fields; the limit is 4,096"),
        (lie(NONE, ONE, LONG), "ends within its header"),
        (lie(NONE, ONE, NAME, struct.pack("<II", 9, 0), LONG), "values in arrays; the limit is"),
        (lie(NONE, ONE, NAME, struct.pack("<II", 9, 9), ONE), "an array of kind 9, which is unk"),
        (lie(NONE, ONE, NAME, struct.pack("<I", 77)), "a value of kind 77, which is unknown"),
        (lie(ONE, NONE, NAME, struct.pack("<I", 5)), "the tensor x has 5 dimensions"),
        (lie(ONE, NONE, NAME, struct.pack("<IQIQ", 1, 8, 999, 0)), "type 999, which is unknown"),
        (lie(ONE, NONE, NAME, struct.pack("<IQIQ", 1, 33, 8, 0)), "x has rows of 33, and Q8_0"),
        (
            lie(ONE, NONE, NAME, struct.pack("<IQQIQ", 2, 1 << 60, 1 << 60, 0, 0)),
            "ends within the tensor x: the file is not complete",
        ),
    ],
)
def test_lies_are_refused_at_once(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "lie.gguf").write_bytes(content)
    with pytest.raises(PretrainedError, match=message):
        convert(tmp_path / "lie.gguf", tmp_path / "run")
