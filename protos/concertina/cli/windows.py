"""Cuts what is longer than a model's context, and whole datasets, into windows, and scores them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from concertina.client import Model, Overloaded, Score
from concertina.client.errors import InvalidRequest

DATASET = "dataset.json"
AT_ONCE: Final = 4
"""Windows that are asked for side by side: a server scores one while the next are on their way."""


@dataclass(frozen=True)
class Window:
    """One prompt to score."""

    tokens: tuple[int, ...]
    new: int
    """Tokens at the end that no window before has; the others are there to be seen."""
    label: str | None = None
    sizes: tuple[int, ...] = ()
    """Bytes of text that each token is; none if all are one."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out tokens of a dataset made by `concertina data`."""

    folder: Path
    info: dict[str, Any]
    tokens: npt.NDArray[np.integer[Any]]

    @property
    def modality(self) -> str:
        """`text` or `image`."""
        return str(self.info["modality"])


def read_heldout(folder: Path) -> HeldOut:
    """Read the held-out part of a dataset."""
    info = json.loads((folder / DATASET).read_text())
    return HeldOut(folder, info, np.load(folder / "heldout.npy", mmap_mode="r"))


def heldout_windows(data: HeldOut, model: Model, stride: int) -> Iterator[Window]:
    """The windows of a dataset: of text by `stride`, of images one for each.

    Raises InvalidRequest if the model has other tokens than the dataset.
    """
    image, info = model.image, data.info
    colours = bytes(channel for colour in info["palette"] for channel in colour)
    here = (
        ("vocabulary", info["vocabulary"], model.vocabulary),
        ("set of labels", tuple(info["labels"]), model.labels),
        ("width", info["image_width"], image.width if image else 0),
        ("height", info["image_height"], image.height if image else 0),
        ("palette", colours, image.palette if image else b""),
    )
    for name, of_data, of_model in here:
        if of_data != of_model:
            raise InvalidRequest(
                f"{model.name} has another {name} than {data.folder}: score the data that it was "
                "trained on, or data with the same tokens"
            )
    if data.modality == "text":
        yield from text_windows(data.tokens, model.context, stride)
        return
    for row in data.tokens:
        label = None if row[0] < 0 else model.labels[row[0]]
        yield Window(tuple(row[1:].tolist()), len(row) - 1, label)


def text_windows(
    tokens: bytes | npt.NDArray[np.integer[Any]],
    context: int,
    stride: int,
    sizes: Sequence[int] = (),
    shared: int = 0,
) -> Iterator[Window]:
    """Windows of at most `context` tokens, `stride` apart; together they count each token once.

    sizes: bytes of text that each token is; none if all are one. shared: tokens that a window has
    at least of the one before; 1 where the first token of a prompt is not predicted.
    With a smaller stride, tokens see more of what is before them, and more is computed. Raises
    InvalidRequest for a stride outside 1 to `context`.
    """
    if not 1 <= stride <= context:
        raise InvalidRequest(f"--stride is {stride}: it must be from 1 to the context, {context}")
    first = counted = 0
    while counted < len(tokens):
        window = tokens[first : first + context]
        new = first + len(window) - counted
        yield Window(tuple(map(int, window)), new, sizes=tuple(sizes[first : first + context]))
        counted = first + len(window)
        first = max(first + 1, min(first + stride, counted - shared))


def spread(windows: Sequence[Window], limit: int | None) -> list[Window]:
    """At most `limit` of the windows, evenly spread over all."""
    if limit is None or len(windows) <= limit:
        return list(windows)
    return [windows[int(at)] for at in np.linspace(0, len(windows) - 1, limit)]


def score_all(
    windows: Sequence[Window],
    score: Callable[[Window], Score],
    on_score: Callable[[Window, Score], None],
) -> list[Score]:
    """The scores of the windows, in their order. `on_score` is called for each as it comes.

    Several are asked for at once. When the server, or the quota of the key, has no room for so
    many, fewer are. Raises what `score` raises.
    """
    scores: dict[int, Score] = {}
    left, running, most = deque(range(len(windows))), dict[Future[Score], int](), AT_ONCE
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        while left or running:
            while left and len(running) < most:
                at = left.popleft()
                running[pool.submit(score, windows[at])] = at
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            refused: list[Overloaded] = []
            for future in done:
                at = running.pop(future)
                try:
                    scores[at] = future.result()
                except Overloaded as error:
                    refused.append(error)
                    left.appendleft(at)
                else:
                    on_score(windows[at], scores[at])
            if refused:
                if len(refused) == len(done) and not running:
                    raise refused[0]  # it is others who take the room
                most = max(1, len(running))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # closing the client ends what still runs
    return [scores[at] for at in range(len(windows))]
