"""Scoring what is longer than a context: each token counts once, and sees what it should."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from concertina.cli.main import main
from concertina.cli.windows import Window, spread, text_windows
from concertina.client.errors import InvalidRequest
from concertina.v1 import model_service_pb2
from model.data import Dataset, DatasetInfo, save_dataset
from tests.concertina.conftest import PALETTE, Fake, image_model, text_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `concertina score` in this process: exit code, output, errors in one line."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: str) -> tuple[int, str, str]:
        command = ["concertina", "score", *arguments, "--address", fake.address]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        out, err = capsys.readouterr()
        return exit.value.code, out, " ".join(err.split())

    return run


def short_text_model() -> model_service_pb2.Model:
    model = text_model()
    model.manifest.context = 8
    return model


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 16, 19, 40])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_windows_count_every_token_once_and_none_too_many(length: int, stride: int) -> None:
    tokens = bytes(range(length))
    windows = list(text_windows(tokens, 8, stride))
    assert [token for window in windows for token in window.tokens[-window.new :]] == list(tokens)
    starts = [window.tokens[0] for window in windows]
    assert starts == [stride * number for number in range(len(windows))]
    assert all(window.new >= 1 and len(window.tokens) <= 8 for window in windows)
    assert all(len(window.tokens) == 8 for window in windows[:-1])


@pytest.mark.parametrize("stride", [0, 9])
def test_windows_may_not_leave_tokens_out(stride: int) -> None:
    with pytest.raises(InvalidRequest, match=f"--stride is {stride}: it must be from 1 to .* 8"):
        list(text_windows(b"x" * 20, 8, stride))


def test_a_limit_takes_windows_from_everywhere() -> None:
    windows = [Window((number,), 1) for number in range(100)]
    assert [window.tokens[0] for window in spread(windows, 4)] == [0, 33, 66, 99]
    assert spread(windows, 200) == spread(windows, None) == windows


# The fake needs as many bits for a token as there are tokens before it in the prompt.
@pytest.mark.parametrize(
    ("arguments", "bits", "count"),
    [((), 28 + 28 + 6, 3), (("--stride", "4"), 28 + 3 * 22, 4)],
)
def test_a_long_text_is_scored_in_windows(
    arguments: tuple[str, ...], bits: int, count: int, fake: Fake, run: Run, tmp_path: Path
) -> None:
    fake.models = [short_text_model()]
    text = "äbcdefghijklmnopqrs"  # 20 bytes
    (tmp_path / "long.txt").write_text(text)
    code, out, _ = run(str(tmp_path / "long.txt"), *arguments)
    said = f"{bits / 20:.4f} bits/byte over 20 tokens in {count} windows (prose)\n"
    assert (code, out) == (0, said)
    first = fake.requests[0].prompt
    assert bytes(first.tokens.ids) == text.encode()[:8] and not first.HasField("label")


def test_a_text_as_long_as_the_context_is_one_prompt(fake: Fake, run: Run, tmp_path: Path) -> None:
    fake.models = [short_text_model()]
    (tmp_path / "short.txt").write_text("abcdefgh")
    assert run(str(tmp_path / "short.txt"))[0] == 0
    assert [request.prompt.text for request in fake.requests] == ["abcdefgh"]


def test_a_dataset_of_text_is_scored_on_what_was_held_out(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    info = DatasetInfo("text", 256, "x", "CC0-1.0")
    held = np.arange(20, dtype=np.uint8)
    save_dataset(tmp_path, Dataset(info, np.zeros(50, np.uint8), held))
    fake.models = [short_text_model(), image_model()]
    code, out, _ = run(str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out) == {
        "model": "prose",
        "fingerprint": "f0",
        "bits_per_token": (28 + 28 + 6) / 20,
        "tokens": 20,
        "windows": 3,
    }
    assert [list(request.prompt.tokens.ids) for request in fake.requests] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    _, out, _ = run(str(tmp_path), "--limit", "2")
    assert out == f"{(28 + 6) / 12:.4f} bits/byte over 12 tokens in 2 windows (prose)\n"


def images(labels: tuple[str, ...], colours: bytes = PALETTE) -> Dataset:
    palette = tuple(tuple(colours[at : at + 3]) for at in range(0, 12, 3))
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 4, 3, palette, labels)  # type: ignore[arg-type]
    rows = np.random.default_rng(0).integers(4, size=(3, 13)).astype(np.int16)
    rows[:, 0] = (0, -1, 0)
    return Dataset(info, rows, rows)


def test_a_dataset_of_images_is_scored_with_its_labels(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    data = images(("Food & Drink",))
    save_dataset(tmp_path, data)
    code, out, _ = run(str(tmp_path))
    assert (code, out) == (0, "5.5000 bits/dim over 36 tokens in 3 windows (pictures)\n")
    prompts = [request.prompt for request in fake.requests]
    assert [list(prompt.tokens.ids) for prompt in prompts] == data.heldout[:, 1:].tolist()
    labels = [prompt.label if prompt.HasField("label") else None for prompt in prompts]
    assert labels == ["Food & Drink", None, "Food & Drink"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(("Other",)), "set of labels"),
        (images(("Food & Drink",), bytes(12)), "palette"),
    ],
)
def test_data_that_a_model_was_not_made_for_is_refused(
    data: Dataset, message: str, fake: Fake, run: Run, tmp_path: Path
) -> None:
    save_dataset(tmp_path, data)
    code, _, err = run(str(tmp_path))
    assert code == 1
    assert f"pictures has another {message} than {tmp_path}" in err
    assert not fake.requests


def test_a_folder_of_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run(str(tmp_path))
    assert code == 2
    assert "is not a file" in err and "dataset.json is not in it" in err
