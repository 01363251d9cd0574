"""Batches: a pure function of seed and step, shifted by one, split where documents are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data import (
    IGNORED,
    MASKED,
    Dataset,
    DatasetInfo,
    draw_batch,
    heldout_batches,
    load_dataset,
    mask,
    save_dataset,
    shift_images,
    shift_text,
)


def text(documents: int = 40, seed: int = 0) -> Dataset:
    """Documents whose bytes count up from 1, so that a window shows where it lies in its own."""
    lengths = np.random.default_rng(seed).integers(5, 60, size=documents)
    run = np.concatenate([[*range(1, length), 0] for length in lengths]).astype(np.uint8)
    return Dataset(DatasetInfo("text", 256, "counting", "CC0-1.0"), run, run[:100])


def images(count: int = 500) -> Dataset:
    """Pictures of 2x3 pixels; pixel p of picture i is (i + p) mod 7, its label i mod 2."""
    rows = np.array([[i % 2, *((i + p) % 7 for p in range(6))] for i in range(count)], np.int16)
    info = DatasetInfo(
        "image", 7, "stripes", "CC0-1.0", 2, 3, tuple((i, i, i) for i in range(7)), ("even", "odd")
    )
    return Dataset(info, rows, rows[:5])


def test_what_the_tokens_mean() -> None:
    assert (text().info.starts, text().info.unit) == (1, "bits/byte")
    assert (images().info.starts, images().info.unit) == (3, "bits/dim")


@pytest.mark.parametrize("dataset", [text(), images()], ids=["text", "images"])
def test_batches_are_a_pure_function_of_seed_and_step(dataset: Dataset) -> None:
    context = 6
    first = draw_batch(dataset, context, 4, seed=1, step=9)
    np.random.seed(3)
    draw_batch(dataset, context, 4, seed=1, step=8)  # whatever was drawn in between
    again = draw_batch(dataset, context, 4, seed=1, step=9)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, step in ((1, 10), (2, 9), (9, 1)):
        other = draw_batch(dataset, context, 4, seed, step)
        assert not np.array_equal(first[1], other[1])


def test_text_inputs_are_the_targets_one_later_behind_the_start_token() -> None:
    inputs, targets = draw_batch(text(), 20, 64, seed=0, step=0)
    assert inputs.shape == targets.shape == (64, 20)
    assert inputs.dtype == targets.dtype == np.int64
    assert (inputs[:, 0] == 256).all()
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_text_windows_are_of_the_data_and_half_begin_with_a_document() -> None:
    dataset = text()
    run = dataset.train.tobytes()
    begins = []
    for step in range(20):
        _, targets = draw_batch(dataset, 30, 32, seed=0, step=step)
        assert all(window.astype(np.uint8).tobytes() in run for window in targets)
        begins += [window[0] == 1 for window in targets]
    assert 0.45 < np.mean(begins) < 0.65  # a half, and the few of the rest that hit one by chance


def test_text_windows_reach_both_ends_of_the_data() -> None:
    run = np.arange(1, 13, dtype=np.uint8)
    dataset = Dataset(DatasetInfo("text", 256, "x", "CC0-1.0"), run, run)
    _, targets = draw_batch(dataset, 10, 200, seed=0, step=0)
    assert {int(window[0]) for window in targets} == {1, 2, 3}
    _, targets = draw_batch(dataset, 12, 3, seed=0, step=0)
    assert (targets == run).all()


def test_text_shorter_than_a_window_is_refused() -> None:
    run = np.ones(12, np.uint8)
    dataset = Dataset(DatasetInfo("text", 256, "x", "CC0-1.0"), run, run)
    with pytest.raises(ValueError, match="12 training tokens are fewer than one window of 13"):
        draw_batch(dataset, 13, 1, seed=0, step=0)


def test_images_follow_their_label_and_a_tenth_have_none() -> None:
    unlabelled = total = 0
    for step in range(20):
        inputs, targets = draw_batch(images(), 6, 50, seed=0, step=step)
        assert inputs.shape == targets.shape == (50, 6)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert np.array_equal((targets[:, :1] + np.arange(6)) % 7, targets)
        assert set(np.unique(inputs[:, 0])) <= {7, 8, 9}
        unlabelled += int((inputs[:, 0] == 7).sum())
        total += 50
    assert 0.06 < unlabelled / total < 0.14


def test_drawing_leaves_the_dataset_alone() -> None:
    dataset = images()
    before = dataset.train.copy()
    draw_batch(dataset, 6, 500, seed=0, step=0)
    assert np.array_equal(dataset.train, before)


def test_shifts_by_hand() -> None:
    inputs, targets = shift_text(np.array([[5, 6, 0], [7, 0, 8]]), 256)
    assert inputs.tolist() == [[256, 5, 6], [256, 7, 0]]
    assert targets.tolist() == [[5, 6, 0], [7, 0, 8]]
    inputs, targets = shift_images(np.array([[-1, 3, 4, 5], [0, 6, 6, 6], [1, 0, 1, 2]]), 7)
    assert inputs.tolist() == [[7, 3, 4], [8, 6, 6], [9, 0, 1]]
    assert targets.tolist() == [[3, 4, 5], [6, 6, 6], [0, 1, 2]]


def test_heldout_text_is_read_once_in_order_without_its_rest() -> None:
    dataset = text()
    batches = list(heldout_batches(dataset, 30, 2))
    assert [len(targets) for _, targets in batches] == [2, 1]
    read = np.concatenate([targets.ravel() for _, targets in batches])
    assert np.array_equal(read, dataset.heldout[:90])
    assert all((inputs[:, 0] == 256).all() for inputs, _ in batches)


@pytest.mark.parametrize(("limit", "chosen"), [(1, [0]), (3, [0, 2, 4]), (99, [0, 1, 2, 3, 4])])
def test_heldout_limit_is_spread_evenly(limit: int, chosen: list[int]) -> None:
    dataset = images()
    read = np.concatenate([targets for _, targets in heldout_batches(dataset, 6, 2, limit)])
    assert np.array_equal(read, dataset.heldout[chosen, 1:])


@pytest.mark.parametrize("dataset", [text(), images()], ids=["text", "images"])
def test_datasets_survive_the_disk(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(tmp_path / "new" / "folder", dataset)
    loaded = load_dataset(tmp_path / "new" / "folder")
    assert loaded.info == dataset.info
    for part in ("train", "heldout"):
        got: Any = getattr(loaded, part)
        assert got.dtype == getattr(dataset, part).dtype
        assert np.array_equal(got, getattr(dataset, part))


def test_a_folder_without_a_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a dataset: dataset.json"):
        load_dataset(tmp_path)


def test_masked_tokens_are_hidden_and_asked_for() -> None:
    tokens = np.random.default_rng(0).integers(256, size=(200, 64))
    inputs, targets = mask(tokens, 256, (3, 5))
    asked = targets != IGNORED
    assert asked.mean() == pytest.approx(MASKED, rel=0.1)
    assert (inputs[asked] == 256).all() and np.array_equal(targets[asked], tokens[asked])
    assert np.array_equal(inputs[~asked], tokens[~asked])
    again, other = mask(tokens, 256, (3, 5)), mask(tokens, 256, (3, 6))
    assert np.array_equal(again[1], targets) and not np.array_equal(other[1], targets)


def test_every_masked_row_asks_for_something() -> None:
    _, targets = mask(np.zeros((100, 2), np.int64), 256, (0,))
    assert ((targets != IGNORED).sum(axis=1) > 0).all()
    assert (targets[:, 1] == IGNORED).any()
