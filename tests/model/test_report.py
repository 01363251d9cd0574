"""The report of a run: what it shows is what was measured, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from concertina.cli.main import main
from model.config import ModelConfig
from model.data import Dataset, DatasetInfo, save_dataset
from model.report import REPORT, draw_samples, round_numbers, write_report
from model.run import TrainConfig, load_checkpoint, read_log
from model.train import train
from tests.checkpoints import write_checkpoint
from tests.model.test_stopping import ARGUMENTS, text

MODEL = ModelConfig(4, context=16, width=16, layers=2, heads=2, mlp=16, span=4)
RUN = TrainConfig(tokens=6 * 32, rows=2, warmup=3, evaluate_every=2)
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
LABELS = ("Food & Drink", "<b>")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a<b"
    train(folder, MODEL, RUN, text())
    return folder


def pictures() -> Dataset:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 8, 2, PALETTE, LABELS)
    rows = np.random.default_rng(0).integers(2, size=(9, 17)).astype(np.int16)
    return Dataset(info, rows, rows[:2])


class Words(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_report_has_every_evaluation(run: Path) -> None:
    write_report(run, text().info)
    page = (run / REPORT).read_text()
    words = Words(page).cells
    assert "a<b" in words and "<b" not in page.replace("<body", "").replace("<b>", "")
    log = read_log(run)
    assert [done.step for done in log] == [2, 4, 6]
    for done in log:
        assert f"{done.heldout:.4f}" in words and f"{done.bits:.4f}" in words
    assert f"{log[-1].heldout:.4f} bits/byte" in words
    assert "weight_decay" in words and "0.3" in words
    assert "Samples" not in words
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_lower_bits_are_lower_on_the_curve(run: Path) -> None:
    write_report(run, text().info)
    found = re.search(r"<svg.*</svg>", (run / REPORT).read_text())
    assert found
    line = ElementTree.fromstring(found[0]).find(".//polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    heldout = [done.heldout or 0 for done in read_log(run)]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert np.argsort([-y for _, y in points]).tolist() == np.argsort(heldout).tolist()


@pytest.mark.parametrize(
    "values",
    [[1.9], [4.7, 1.73, 2.2], [0.0232, 0.0525], [0.0, 0.0], [8.0, 7.9999], [1234.5, 3.25], [2, 3]],
)
def test_the_numbers_of_the_axis_are_round_and_hold_the_curve(values: list[float]) -> None:
    ticks = round_numbers(values)
    numbers = [float(tick) for tick in ticks]
    assert 2 <= len(ticks) == len(set(ticks)) <= 8
    assert numbers[0] <= min(values) and max(values) <= numbers[-1]
    assert np.allclose(np.diff(numbers), numbers[1] - numbers[0])
    assert max(map(len, ticks)) <= 6


def test_one_evaluation_is_no_curve(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, MODEL, replace(RUN, evaluate_every=100), text())
    write_report(folder, text().info)
    page = (folder / REPORT).read_text()
    assert "<svg" not in page and "Evaluations" in page


def test_settings_are_apart_and_readable(run: Path) -> None:
    write_report(run, replace(text().info, labels=("a", "b")))
    words = Words((run / REPORT).read_text()).cells
    places = [words.index(part) for part in ("Model", "context", "Training", "tokens", "Data")]
    assert places == sorted(places)
    assert words[words.index("bfloat16") + 1] == "yes"
    assert "Begins with" not in words


def test_samples_are_what_the_model_draws(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "run", MODEL, text().info))
    with torch.no_grad():
        checkpoint.model.head.weight.zero_()
        checkpoint.model.head.bias.copy_(torch.tensor([-50.0, 0.0, 0.0, -50.0]))
    samples, again = draw_samples(checkpoint), draw_samples(checkpoint)
    assert samples is not None and again is not None
    assert samples.shape == (4, 16)
    assert set(samples.ravel().tolist()) == {1, 2}
    assert (samples == again).all()
    other = draw_samples(checkpoint, seed=1)
    assert other is not None and (samples != other).any()


def test_a_label_is_that_of_its_picture(tmp_path: Path) -> None:
    model = replace(MODEL, starts=3, span=8)
    folder = tmp_path / "run"
    train(folder, model, RUN, pictures())
    samples = draw_samples(load_checkpoint(folder))
    assert samples is not None and samples.shape == (4, 16)
    write_report(folder, pictures().info, samples)
    page = (folder / REPORT).read_text()
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert [label for _, label in found] == ["Food &amp; Drink", "&lt;b&gt;"] * 2
    for (data, _), row in zip(found, samples, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (8, 2)
        colours = [PALETTE[token] for token in row]
        assert np.asarray(image.convert("RGB")).reshape(-1, 3).tolist() == list(map(list, colours))


def test_text_ends_where_its_document_does(run: Path) -> None:
    rows = np.array([[60, 98, 62, 0, 99], [255, 65, 66, 67, 68]])
    write_report(run, text().info, rows)
    page = (run / REPORT).read_text()
    assert "<pre>&lt;b&gt;</pre>" in page
    assert "<pre>\N{REPLACEMENT CHARACTER}ABCD</pre>" in page


@pytest.mark.parametrize("changes", [{"attention": "fixed-bidirectional"}, {"context": 4096}])
def test_what_cannot_be_drawn_has_no_samples(changes: Any, tmp_path: Path) -> None:
    info = replace(pictures().info, image_width=64, image_height=64)
    folder = write_checkpoint(tmp_path / "run", replace(MODEL, **changes), info)
    assert draw_samples(load_checkpoint(folder)) is None


def test_the_command_leaves_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tmp_path / "data", text())
    out = tmp_path / "run"
    arguments = [str(tmp_path / "data"), str(out), *ARGUMENTS, "--tokens", "64"]
    monkeypatch.setattr(sys, "argv", ["concertina", "train", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    assert f"{out / REPORT}" in capsys.readouterr().err.replace("\n", "")
    assert "<h2>Samples</h2>" in (out / REPORT).read_text()
