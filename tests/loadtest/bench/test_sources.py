"""A pretrained model in the bench: what each engine gets of it, and who cannot take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from concertina.bundle.resources import peak_state_bytes
from loadtest.bench import command
from loadtest.bench.adapters.bundles import make_bundle_of
from loadtest.bench.adapters.sources import prepare, write_transformers
from loadtest.bench.contestants import bundle_contestant, contestants_of, read_source
from loadtest.bench.plan import ROOM, Cell, Plan, Shape, cache_bytes
from loadtest.bench.process import in_processes, prepare_source
from loadtest.bench.report import absent, ratios
from loadtest.bench.run import Report, job_of, run
from loadtest.bench.worker import OK
from model.pretrained.convert import convert
from model.pretrained.source import PretrainedError
from server.bundles.bundle import load_bundle
from tests.checkpoints import checkpoint_of, narrow_tiny, quantise_tiny
from tests.model.pretrained.architectures import make, save
from tests.model.pretrained.folders import TOKENIZER, write

SIXTEEN = Cell(16, 2)


def run_of(root: Path, name: str) -> Path:
    """The run that an architecture of random weights is converted to."""
    convert(save(make(name), root / f"{name}-hf"), root / name)
    return root / name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_run_becomes_the_folder_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    write_transformers(run_of(tmp_path, name), tmp_path / "back")
    there = load_file(tmp_path / f"{name}-hf" / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, make(name)(tokens).logits)


def test_the_base_of_the_positions_is_found_again(tmp_path: Path) -> None:
    for theta in (1e4, 130_000.0, 5e5, 123_456.0):
        folder = tmp_path / str(theta)
        folder.mkdir()
        convert(write(folder / "hf", rope_theta=theta), folder / "run")
        write_transformers(folder / "run", folder / "back")
        assert json.loads((folder / "back" / "config.json").read_text())["rope_theta"] == theta


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama3", "scaled rotary positions"),
        ("mistral", "layers that differ"),
        ("gpt2", "a run of gpt2"),
    ],
)
def test_what_is_not_written_is_named_with_the_remedy(name: str, why: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name)
    with pytest.raises(PretrainedError, match=why):
        write_transformers(run, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (tmp_path / "made").mkdir()
    source = prepare(run, tmp_path / "made")
    assert source.transformers == "" and why in source.unable
    assert source.unable.endswith("give the Hugging Face folder that it was made of")
    able = {c.name for c in contestants_of(source, ()) if not c.unable}
    assert able == {"ours", "ours-cache-float16"}
    (tmp_path / "other").mkdir()
    source = prepare(tmp_path / f"{name}-hf", tmp_path / "other")
    assert source.transformers == str(tmp_path / f"{name}-hf") and not source.unable


def test_a_source_is_described_and_made_once(tmp_path: Path) -> None:
    made = prepare_source(write(tmp_path / "hf"), tmp_path / "models")
    source = read_source(made)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    shape = source.shape
    assert (shape.layers, shape.width) == (
        settings["num_hidden_layers"],
        settings["hidden_size"],
    )
    assert shape.kv_heads == settings.get("num_key_value_heads", shape.heads)
    assert (source.context, source.span) == (settings["max_position_embeddings"], None)
    assert shape.gated and source.gguf == ""
    before = (made / "source.json").stat().st_mtime_ns
    assert prepare_source(tmp_path / "hf", tmp_path / "models") == made
    assert (made / "source.json").stat().st_mtime_ns == before
    with pytest.raises(RuntimeError, match=r"is neither the folder of a model nor a \.gguf file"):
        prepare_source(Path(__file__), tmp_path / "models")


def test_shapes_count_shared_heads_gates_and_ties() -> None:
    shape = Shape(2, 64, 4, 96, 100, kv_heads=2, channels=32, gated=True, tied=True)
    assert shape.entry_bytes() == 2 * 2 * 2 * 32 * 4
    layer = 64 * (4 + 4) * 32 + 2 * 64 * 2 * 32 + 3 * 64 * 96
    assert shape.matrix_bytes("float32") == 4 * (2 * layer + 64 * 100)


def test_every_peer_gets_what_it_takes(tmp_path: Path) -> None:
    source = prepare(write(tmp_path / "hf"), tmp_path)
    by_name = {c.name: c for c in contestants_of(source, ())}
    assert {c.name for c in by_name.values() if c.role == "ours"} == {"ours", "ours-cache-float16"}
    for name in ("vllm-float32", "vllm-bfloat16", "transformers", "transformers-bfloat16"):
        assert by_name[name].folder == str(tmp_path / "hf") and not by_name[name].source
    for name in ("genai", "genai-int4", "genai-graph"):
        assert by_name[name].source == str(tmp_path / "hf") and not by_name[name].folder
    for name in ("llama-f32", "llama-q8_0", "llama-gguf"):
        assert by_name[name].unable == "it takes GGUF files only: name one as --source"


def test_llama_runs_the_very_file_and_what_it_makes_of_it(tmp_path: Path) -> None:
    from dataclasses import replace

    source = prepare(write(tmp_path / "hf"), tmp_path)
    by_name = {c.name: c for c in contestants_of(replace(source, gguf="m.gguf"), ())}
    assert (by_name["llama-gguf"].folder, by_name["llama-gguf"].source) == ("m.gguf", "")
    for name in ("llama-f32", "llama-q8_0"):
        assert (by_name[name].folder, by_name[name].source) == ("", "m.gguf")
    assert "llama-q4_0" not in by_name
    job = job_of(Plan((), (), source="x"), SIXTEEN, by_name["llama-f32"], tmp_path)
    assert job.setting.source == Path("m.gguf") and job.folder.startswith(str(tmp_path))
    job = job_of(Plan((), (), source="x"), SIXTEEN, by_name["llama-gguf"], tmp_path)
    assert (job.folder, job.setting.source) == ("m.gguf", None)


def test_a_bundle_of_any_kind_is_a_contestant(fixed_bundle: Path, full_bundle: Path) -> None:
    for folder, weights, state, span, rows in (
        (full_bundle, "float32", "float32", None, 1),
        (quantise_tiny(full_bundle, 4), "int4", "float32", None, 2),
        (narrow_tiny(fixed_bundle, 8), "int8", "int8", 8, 2),
    ):
        found, bundle = bundle_contestant(folder), load_bundle(folder)
        assert (found.weights, found.state, found.span, found.extra_rows) == (
            weights,
            state,
            span,
            rows,
        )
        assert found.folder == str(folder.resolve()) and found.role == "ours"
        assert cache_bytes(Shape(), found, 256) == bundle.max_state_bytes
        assert found.state_bytes == peak_state_bytes(bundle.manifest, bundle.context)
        assert found.is_float32 == (folder == full_bundle)


def test_a_run_is_exported_for_no_more_tokens_than_are_measured(
    fixed_bundle: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "hf", max_position_embeddings=4096)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    convert(folder, tmp_path / "run")
    for name, state in (("a", "float32"), ("b", "float16")):
        make_bundle_of(tmp_path / "run", tmp_path / name, 700, state)
        bundle = load_bundle(tmp_path / name)
        assert (bundle.context, bundle.cache_type) == (700, state)
    make_bundle_of(checkpoint_of(fixed_bundle), tmp_path / "ours", 700)
    assert load_bundle(tmp_path / "ours").span == load_bundle(fixed_bundle).span


def test_who_cannot_take_the_model_is_named_and_not_started(tmp_path: Path) -> None:
    source = prepare(write(tmp_path / "hf"), tmp_path)
    llama = tuple(c for c in contestants_of(source, ()) if c.name == "llama-gguf")
    plan = Plan((SIXTEEN,), llama, source=source.name, shape=source.shape)

    def forbidden(job: object) -> Any:
        raise AssertionError("it was started")

    report = run(plan, forbidden, tmp_path, lambda progress: None)
    assert absent(report) == [
        "llama.cpp, the file as it is: not measured: failed: it takes GGUF files only: name one "
        "as --source (16 x 2)"
    ]


@pytest.mark.slow
def test_engines_decode_a_pretrained_model_in_turns(tmp_path: Path) -> None:
    """Ours from the run and as a bundle, beside Transformers, for real."""
    folder = write(tmp_path / "hf", max_position_embeddings=4096)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    made = prepare_source(folder, tmp_path / "models")
    source = read_source(made)
    make_bundle_of(Path(source.run), tmp_path / "given", 4096, "float16")
    names = ("ours", "given", "transformers", "transformers-bfloat16")
    chosen = [c for c in contestants_of(source, [tmp_path / "given"]) if c.name in names]
    plan = Plan(
        (SIXTEEN, Cell(16, 1, first_token=True)),
        tuple(chosen),
        source=source.name,
        shape=source.shape,
        rounds=1,
        first_token_rounds=1,
        window_s=0.01,
        threads=1,
    )
    with in_processes({}) as open_contender:
        report: Report = run(plan, open_contender, made, lambda progress: None)
    for result in report.results:
        assert [(e.name, e.outcome, e.detail) for e in result.entries] == [
            (name, OK, "") for name in names
        ]
    sizes = {e.name: e.cache_bytes for e in report.results[0].entries}
    assert sizes["ours"] == sizes["transformers"] == source.shape.entry_bytes() * (16 + ROOM)
    assert sizes["given"] == source.shape.entry_bytes("float16") * 4096
    found = {each.name for each in ratios(report)}
    assert {"pretrained_16_2_best", "pretrained_16_2_float32"} <= found
    assert not any(name.startswith(("decode", "cache")) for name in found)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bundle", "."], "--bundle needs --source"),
        (["--source", "{hf}", "--cells", "4kx1"], "4k x 1 and 512 more tokens are above"),
        (["--source", "{hf}", "--only", "fixed"], "there is no fixed; there are ours, ours-cache"),
        (["--source", "{hf}", "--bundle", "{hf}"], "--bundle: "),
        (["--source", "{hf}", "--device", "cuda"], "is measured as it is, on the CPU"),
        (["--source", "."], "--source: "),
    ],
)
def test_options_that_do_not_fit_a_source_are_refused(
    options: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    hf = str(write(tmp_path / "hf"))
    app = typer.Typer()
    app.command()(command.bench)
    given = [option.replace("{hf}", hf) for option in options]
    ran = CliRunner().invoke(app, [*given, "--models", str(tmp_path)], env={"COLUMNS": "300"})
    assert ran.exit_code == 2 and complaint in ran.output, ran.output
