"""What is left of a model on disk: a whole run, or nothing and words that say why."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open

from concertina.cli.main import main
from model.pretrained.convert import convert
from model.pretrained.source import PretrainedError
from model.run import Origin, load_checkpoint
from tests.model.pretrained.folders import TOKENIZER, tensors, write


def test_a_run_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", _name_or_path="them/tiny")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    convert(folder, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    expected = Origin("them/tiny", "llama", "apache-2.0", digest, begin_token=1, end_tokens=(2, 3))
    assert checkpoint.origin == expected
    assert (checkpoint.data.source, checkpoint.data.license) == ("them/tiny", "apache-2.0")
    assert checkpoint.config.vocabulary == 11 and checkpoint.config.starts == 0
    assert (tmp_path / "run" / "tokenizer.json").read_text() == TOKENIZER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny"]


def test_the_licence_is_not_guessed(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", eos_token_id=None)
    assert convert(folder, tmp_path / "a").license == "NOASSERTION"
    told = convert(folder, tmp_path / "b", license="MIT")
    assert (told.license, told.source, told.end_tokens) == ("MIT", "tiny", ())


def test_how_to_generate_says_more_about_the_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert convert(folder, tmp_path / "run").end_tokens == (7,)


def test_weights_keep_their_type_and_stay_in_order(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in tensors().items()}
    convert(write(tmp_path / "tiny", weights), tmp_path / "run")
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", framework="pt") as file:
        up = file.get_tensor("model.blocks.1.up.weight")
        qkv = file.get_tensor("model.blocks.1.qkv.weight")
    mlp, attention = "model.layers.1.mlp", "model.layers.1.self_attn"
    parts = [weights[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(up, torch.cat(parts))
    assert torch.equal(qkv, torch.cat([weights[f"{attention}.{x}_proj.weight"] for x in "qkv"]))


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    weights = tensors()
    del weights["lm_head.weight"]
    convert(write(tmp_path / "tiny", weights, tie_word_embeddings=True), tmp_path / "run")
    model = load_checkpoint(tmp_path / "run").model
    assert torch.equal(model.head.weight, weights["model.embed_tokens.weight"])
    assert model.head.weight is model.embed.weight


def test_a_body_without_a_prefix_is_the_same(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): weight for name, weight in tensors().items()}
    convert(write(tmp_path / "bare", bare), tmp_path / "a")
    convert(write(tmp_path / "tiny"), tmp_path / "b")
    models = [load_checkpoint(tmp_path / name).model.state_dict() for name in "ab"]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


def test_every_parameter_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(
        write(tmp_path / "tiny"),
        tmp_path / "run",
        on_tensor=lambda name, done, count: told.append((done, count)),
    )
    assert told == [(n, 15) for n in range(1, 16)]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    weights = tensors()
    weights["model.norm.weight"] = torch.ones(17)
    folder = write(tmp_path / "tiny", weights)
    with pytest.raises(PretrainedError, match=r"model.norm.weight has shape 17, and .* say 16"):
        convert(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="run exists: choose another folder"):
        convert(folder, tmp_path / "run")


def test_tensors_of_another_kind_are_not_passed_over(tmp_path: Path) -> None:
    weights = tensors()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    convert(write(tmp_path / "old", weights), tmp_path / "run")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)
    with pytest.raises(PretrainedError, match=r"llama does not use: model.layers.0.*q_proj.bias"):
        convert(write(tmp_path / "biased", weights), tmp_path / "other")


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_a_token_outside_the_vocabulary_is_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", **{name: 11})
    with pytest.raises(PretrainedError, match=f"{name} is 11; tokens of the model are below 11"):
        convert(folder, tmp_path / "run")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(write(tmp_path / "tiny")), str(tmp_path / "run")]
    for code, said in ((0, "run: llama, 0.0 MB; the source names no licence"), (1, "run exists")):
        monkeypatch.setattr(sys, "argv", ["concertina", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == code
        assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["origin"]["license"]


@pytest.mark.parametrize("there", [True, False])
def test_the_command_says_what_is_missing_to_serve_the_model(
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "tiny")
    if there:
        (source / "tokenizer.json").write_text(TOKENIZER)
    monkeypatch.setattr(sys, "argv", ["concertina", "convert", str(source), str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr().err
    assert exit.value.code == 0
    assert (f"{source} has no tokenizer.json" in said) == (not there)
    assert ("save_pretrained, and convert the model again" in said) == (not there)
