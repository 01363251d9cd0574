"""A run becomes one that remembers less; what is interrupted goes on, and comes out the same."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.data import Dataset, DatasetInfo
from model.layers.architecture import Folding
from model.report import REPORT
from model.run import CHECKPOINT, CONFIG, RunError, load_checkpoint
from model.uptraining.choose import BudgetError
from model.uptraining.compared import TITLES, Comparison, Measured, Variant, verdict
from model.uptraining.keys import Keys
from model.uptraining.measure import Losses, losses
from model.uptraining.run import Settings, uptrain
from model.uptraining.sizes import Size
from model.uptraining.summaries import PASS, FitConfig, Fitted, Interrupted
from model.uptraining.texts import encoder, windows
from model.uptraining.weights import given_weights
from tests.checkpoints import folded_config, write_checkpoint

INFO = DatasetInfo("text", 256, "noise", "CC0-1.0")
SETTINGS = Settings(0.5, 8, 1, 1, 384, 96, FitConfig(12))


def text(seed: int = 0) -> Dataset:
    """Words, often said again."""
    rng = np.random.default_rng(seed)
    words = rng.integers(97, 123, size=(40, 5))
    words[:, 4] = 32
    content = words[rng.integers(40, size=1200)].astype(np.uint8).ravel()
    return Dataset(INFO, content, content[:3000])


def config_of(context: int = 256) -> ModelConfig:
    config = folded_config(Folding(("full", "fold", "fold")), context)
    return replace(
        config, vocabulary=256, starts=1, architecture=replace(config.architecture, folding=None)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "full", config_of(), INFO)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder).model.state_dict()


def test_the_model_stays_and_the_fit_helps(run: Path, tmp_path: Path) -> None:
    said: list[Fitted] = []
    made = uptrain(
        run, tmp_path / "out", text(), SETTINGS, on_layer=lambda done, layers: said.append(done)
    )
    assert [each.layer for each in said] == [0, 1, 2]
    assert tuple(each.errors for each in said) == made.errors
    assert all(each.fitted < each.tangent for each in made.errors)
    assert made.share <= 0.5
    out = load_checkpoint(tmp_path / "out")
    assert out.config == made.config and out.config.span == 8
    assert out.metrics["state_share"] == made.share
    before, after = weights(run), weights(tmp_path / "out")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    folding = made.config.architecture.folding
    assert folding is not None and "full" in folding.layers and "fold" in folding.layers
    fitted = {name.split(".")[1] for name in after.keys() - before.keys()}
    assert fitted == {str(n) for n, kind in enumerate(folding.layers) if kind == "fold"}
    sharp = [after[f"blocks.{n}.pattern.sharpness"] for n in sorted(fitted)]
    assert not any(torch.equal(each, torch.ones_like(each)) for each in sharp)
    assert not (tmp_path / "out" / PASS).exists()
    noted = json.loads((tmp_path / "out" / CONFIG).read_text())["uptraining"]
    assert noted["budget"] == 0.5 and len(noted["errors"]) == 3


def test_what_is_interrupted_goes_on_and_comes_out_the_same(run: Path, tmp_path: Path) -> None:
    uptrain(run, tmp_path / "whole", text(), SETTINGS)
    for stopped in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped after layer {stopped} of 3"):
            uptrain(run, tmp_path / "parts", text(), SETTINGS, stop=lambda: True)
        assert not (tmp_path / "parts" / CHECKPOINT).exists()
    said: list[int] = []
    uptrain(
        run,
        tmp_path / "parts",
        text(),
        SETTINGS,
        on_layer=lambda done, layers: said.append(done.layer),
    )
    assert said == [2]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_text_begins_anew_and_another_budget_does_not(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        uptrain(run, out, text(), SETTINGS, stop=lambda: True)
    said: list[int] = []
    with pytest.raises(Interrupted, match="stopped after layer 2"):
        less = replace(SETTINGS, budget=0.6)
        uptrain(
            run, out, text(), less, on_layer=lambda d, n: said.append(d.layer), stop=lambda: True
        )
    with pytest.raises(Interrupted, match="stopped after layer 1"):
        uptrain(
            run,
            out,
            text(1),
            SETTINGS,
            on_layer=lambda d, n: said.append(d.layer),
            stop=lambda: True,
        )
    assert said == [1, 0]


def test_what_cannot_be_folded_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", text()
    fixed = write_checkpoint(tmp_path / "fixed", ModelConfig(256, 64, 16, 1, 1, 16, 8), INFO)
    with pytest.raises(RunError, match="has fixed attention: only full attention can be folded"):
        uptrain(fixed, out, data, SETTINGS)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    folded = folded_config(Folding(("full", "fold", "fold")))
    write_checkpoint(tmp_path / "folded", folded, INFO)
    with pytest.raises(RunError, match="is folded already"):
        uptrain(tmp_path / "folded", out, data, SETTINGS)
    with pytest.raises(RunError, match="--window-tokens is 300, and the model's context is 256"):
        uptrain(run, out, data, replace(SETTINGS, tokens=600, window_tokens=300))
    with pytest.raises(RunError, match="exists: choose another folder"):
        uptrain(run, again, data, SETTINGS)
    with pytest.raises(BudgetError, match=r"the budget is 0\.01 of full attention's state"):
        uptrain(run, out, data, replace(SETTINGS, budget=0.01, fit=FitConfig(1)))
    pixels = DatasetInfo("image", 7, "n", "n", 8, 4, ((0, 0, 0),) * 7)
    images = write_checkpoint(tmp_path / "images", config_of(), pixels)
    with pytest.raises(RunError, match="model of images: only models of text"):
        uptrain(images, out, data, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.0}, "budget must be above 0 and below 1, got 1.0"),
        ({"window_tokens": 39}, "window_tokens is 39: with this span, sink and window it must be"),
        ({"tokens": 191}, "tokens is 191: it must be at least 192"),
        ({"fit": FitConfig(steps=0)}, "steps must be above 0, got 0"),
        ({"texts": 0}, "texts must be at least 1, got 0"),
        ({"measured": (2048, 255)}, "measured is 255: a text needs at least 256 tokens"),
        ({"fit": FitConfig(rate=0)}, "rate must be above 0, got 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)  # type: ignore[arg-type]


MEASURED = replace(SETTINGS, measured=(256,), texts=3)


def made_up(run: Path, gain: float) -> Comparison:
    """A comparison that folds win by `gain`."""
    config = config_of()
    layers = Folding(("full", "window", "window"), 1, 3, "max")
    window = replace(config, span=8, architecture=replace(config.architecture, folding=layers))
    lost = Losses(256, (2.0, 1.0, 1.0, 1.0), (1.0, 1.0))
    variants: list[Variant] = ["full", "swapped", "folded", "window"]
    keys = Keys(256, (0.5, 1.0, 0.75, 0.75, 0.75), 10)
    kept = Size(256, (256, 40, 40), 43_008, 0.0125)
    untimed = Size(512, (512, 44, 44), 76_800, float("nan"))
    measured = [Measured(each, 0.5, (lost,), (keys,), (kept, untimed)) for each in variants]
    return Comparison(tuple(measured), window, gain, 0.01)


def test_what_loses_to_windows_does_not_fold(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, gain in (("folds", 0.1), ("windows", -0.1)):
        found = made_up(run, gain)
        monkeypatch.setattr("model.uptraining.run.compare", lambda *_, found=found: found)
        made = uptrain(run, tmp_path / name, text(), MEASURED)
        out = load_checkpoint(tmp_path / name)
        assert out.config == made.config
        assert (out.config == found.window) == (name == "windows")
        assert any("pattern" in key for key in weights(tmp_path / name)) == (name == "folds")
        assert out.metrics["window_nats_256"] == 1.25
        assert out.metrics["folded_last_quarter_nats_256"] == 1.0
        assert out.metrics["full_keys_256"] == 0.75
        assert out.metrics["full_keys_256_at_30%"] == 1.0
        assert out.metrics["folded_entries_256"] == 336
        assert out.metrics["window_bytes_512"] == 76_800
        assert out.metrics["window_step_ms_256"] == 12.5
        assert "window_step_ms_512" not in out.metrics
        report = (tmp_path / name / REPORT).read_text()
        other = "windows" if name == "folds" else "folds"
        assert f"{name} lose 0.100 ± 0.020 nats a token less than {other}" in report
        windows_of = "<td>first blocks and sliding windows</td>"
        assert f"{windows_of}<td>0.500</td><td>256</td>" in report
        cells = "<td>256</td><td>256</td><td>40</td><td>0.0</td><td>12.5</td>"
        assert f"{windows_of}{cells}" in report
        assert "<td>512</td><td>512</td><td>44</td><td>0.1</td><td>·</td>" in report
        row = report.split("<figcaption>full attention</figcaption>")[1].split("</figure>")[0]
        assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == ["0.50", "1.00", "0.75", "0.75", "0.75"]
        assert re.findall(r"/ (\S+)\)", row)[:2] == ["0.50", "1.00"]


def test_every_variant_is_measured_on_the_same_text(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = uptrain(run, tmp_path / "out", text(), MEASURED, on_variant=said.append)
    found = made.comparison
    assert found is not None and said == [*TITLES.values()]
    by_name = {each.variant: each for each in found.measured}
    dataset = text()
    hay = windows(dataset.heldout, *encoder(run, load_checkpoint(run)), count=3, length=256)
    full = load_checkpoint(run)
    assert by_name["full"].losses == (losses(full.model, hay),)
    slides = given_weights(found.window, full.model)
    assert by_name["window"].losses == (losses(slides, hay),)
    assert by_name["window"].share >= by_name["folded"].share
    assert [len(each.keys[0].by_depth) for each in found.measured] == [5] * 4
    assert by_name["folded"].sizes[0].entries != by_name["window"].sizes[0].entries
    assert by_name["folded"].losses != by_name["swapped"].losses
    pairs = zip(
        by_name["window"].losses[0].last_by_window,
        by_name["folded"].losses[0].last_by_window,
        strict=True,
    )
    assert found.gain == pytest.approx(np.mean([a - b for a, b in pairs]))
    if found.folds_win:
        own = load_checkpoint(tmp_path / "out").model
        assert by_name["folded"].losses == (losses(own, hay),)


def test_a_difference_within_its_error_is_said_to_be_none(run: Path) -> None:
    assert verdict(made_up(run, 0.019)).endswith("that is not clear of chance")
    assert verdict(made_up(run, -0.021)).endswith("in the last quarter of 256 tokens")
    assert "±" not in verdict(replace(made_up(run, 0.1), error=float("nan")))
