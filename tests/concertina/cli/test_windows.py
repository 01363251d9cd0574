"""Scoring what is longer than a context: each token counts once, and sees what it should."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from concertina.cli.main import main
from concertina.cli.windows import AT_ONCE, Window, score_all, spread, text_windows
from concertina.client import Overloaded, Score
from concertina.client.errors import InvalidRequest
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2
from model.data import Dataset, DatasetInfo, save_dataset
from tests.concertina.conftest import PALETTE, WAIT, Fake, image_model, text_model

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


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_every_token_but_the_first_is_predicted_from_another(length: int, stride: int) -> None:
    """For models that have nothing else to predict the first token of a prompt from."""
    windows = list(text_windows(bytes(range(length)), 8, stride, shared=1))
    predicted = [window.tokens[1:][-window.new :] for window in windows]
    assert [token for each in predicted for token in each] == list(range(1, length))
    assert all(2 <= len(window.tokens) <= 8 for window in windows)


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
    prompts = [request.prompt for request in fake.requests]  # in any order
    assert sum(bytes(each.tokens.ids) == text.encode()[:8] for each in prompts) == 1
    assert not any(each.HasField("label") for each in prompts)


class Scoring:
    """Scores windows, with room for so many at once. The first wait until all have asked."""

    def __init__(self, room: int) -> None:
        self.room, self.most, self.running = room, 0, 0
        self.lock = threading.Lock()
        self.refused = 0
        self.enough = threading.Event()

    def __call__(self, window: Window) -> Score:
        with self.lock:
            full = self.running == self.room
            self.refused += full
            self.running += not full
            self.most = max(self.most, self.running)
            if self.running + self.refused >= AT_ONCE:
                self.enough.set()
        if full:
            raise Overloaded("full", code="RESOURCE_EXHAUSTED")
        self.enough.wait(WAIT / 4)  # until as many have asked as may
        self.enough.set()
        with self.lock:
            self.running -= 1
        return Score("prose", "f0", float(window.tokens[0]), ())


@pytest.mark.parametrize("room", [1, 2, 3, AT_ONCE, 100])
def test_several_windows_are_asked_for_and_fewer_where_there_is_no_room(room: int) -> None:
    scoring, seen = Scoring(room), set[int]()
    windows = [Window((number,), 1) for number in range(30)]
    scores = score_all(windows, scoring, lambda window, score: seen.add(window.tokens[0]))
    assert [score.bits_per_token for score in scores] == list(range(30))
    assert seen == set(range(30))
    assert scoring.most == min(room, AT_ONCE)
    assert scoring.refused == max(0, AT_ONCE - room)


def test_a_refusal_that_others_cause_ends_it() -> None:
    windows = [Window((number,), 1) for number in range(30)]
    with pytest.raises(Overloaded, match="full"):
        score_all(windows, Scoring(0), lambda window, score: None)


def test_the_first_error_ends_it() -> None:
    asked: list[int] = []

    def fail(window: Window) -> Score:
        asked.append(window.tokens[0])
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest, match="no"):
        score_all([Window((number,), 1) for number in range(30)], fail, lambda *_: None)
    assert len(asked) <= AT_ONCE


def test_long_work_says_how_far_it_is(
    fake: Fake, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.models = [short_text_model()]
    (tmp_path / "long.txt").write_text("äbcdefghijklmnopqrs")
    assert run(str(tmp_path / "long.txt"))[2] == ""
    monkeypatch.setattr("concertina.cli.output.LINE_EVERY_S", 0.0)
    _, out, err = run(str(tmp_path / "long.txt"))
    assert out == "3.1000 bits/byte over 20 tokens in 3 windows (prose)\n"
    assert "1 of 3 windows, " in err and "bits/byte so far, 0:00:0" in err
    assert "3 of 3 windows, 3.1000 bits/byte so far, 0:00:00 left" in err
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes it: a terminal
    _, again, err = run(str(tmp_path / "long.txt"))
    assert again == out
    assert "3/3 windows, 3.1000 bits/byte so far" in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", err)


def test_a_text_as_long_as_the_context_is_one_prompt(fake: Fake, run: Run, tmp_path: Path) -> None:
    fake.models = [short_text_model()]
    (tmp_path / "short.txt").write_text("abcdefgh")
    assert run(str(tmp_path / "short.txt"))[0] == 0
    assert [request.prompt.text for request in fake.requests] == ["abcdefgh"]


def text_model_with_tokenizer(begin: int | None) -> model_service_pb2.Model:
    model = short_text_model()
    model.manifest.tokenizer.SetInParent()
    if begin is not None:
        model.manifest.tokenizer.begin_token = begin
    return model


@pytest.mark.parametrize(
    ("spaced", "windows"),
    [(False, [[*range(8)]]), (True, [[*range(8)], [8]])],
    ids=["as many tokens as bytes", "a space before the text"],
)
def test_tokens_and_not_bytes_fill_the_context(
    spaced: bool, windows: list[list[int]], fake: Fake, run: Run, tmp_path: Path
) -> None:
    """A text of just as many bytes as tokens fit may be more tokens than that."""
    fake.models, fake.letters, fake.before = [text_model_with_tokenizer(9)], 1, " " * spaced
    (tmp_path / "short.txt").write_text("abcdefgh")
    code, out, _ = run(str(tmp_path / "short.txt"))
    assert code == 0
    prompts = [each.prompt for each in fake.requests if isinstance(each, pb.ScoreRequest)]
    if not spaced:
        assert [prompt.text for prompt in prompts] == ["abcdefgh"]
        return
    assert sorted([*prompt.tokens.ids] for prompt in prompts) == windows
    # The space is a token, but no byte of the text.
    assert out == f"{28 / 8:.4f} bits/byte over 9 tokens in 2 windows (prose)\n"


@pytest.mark.parametrize("length", [8, 9, 15, 16])
def test_windows_of_a_model_without_a_begin_token_leave_out_only_the_first_token(
    length: int, fake: Fake, run: Run, tmp_path: Path
) -> None:
    fake.models, fake.letters = [text_model_with_tokenizer(None)], 1
    (tmp_path / "long.txt").write_text("abcdefghijklmnop"[:length])
    code, out, _ = run(str(tmp_path / "long.txt"), "--json")
    assert code == 0
    if length > 8:
        assert json.loads(out)["tokens"] == length - 1
    prompts = [each.prompt for each in fake.requests if isinstance(each, pb.ScoreRequest)]
    assert all(len(each.tokens.ids) != 1 for each in prompts)  # which no server would score


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
    assert sorted(list(request.prompt.tokens.ids) for request in fake.requests) == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    _, out, _ = run(str(tmp_path), "--limit", "2")
    assert out == f"{(28 + 6) / 12:.4f} bits/byte over 12 tokens in 2 windows (prose)\n"
    _, out, _ = run(str(tmp_path), "--limit", "1")
    assert " in 1 window (prose)\n" in out


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
    labels = {
        tuple(prompt.tokens.ids): prompt.label if prompt.HasField("label") else None
        for prompt in prompts
    }
    rows = map(tuple, data.heldout[:, 1:].tolist())
    assert labels == dict(zip(rows, ["Food & Drink", None, "Food & Drink"], strict=True))


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
