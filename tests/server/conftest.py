"""Loaded bundles, the models they were exported from, and engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from server.bundles.bundle import Bundle, load_bundle
from server.config import EngineConfig
from tests.server.engines import DrivenModel, is_empty, until

Logits = Callable[[list[int]], npt.NDArray[np.float64]]


@pytest.fixture(scope="session")
def text(text_bundle: Path) -> Bundle:
    """The bundle `tiny-text`, verified."""
    return load_bundle(text_bundle)


@pytest.fixture(scope="session")
def image(image_bundle: Path) -> Bundle:
    """The bundle `tiny-image`, verified."""
    return load_bundle(image_bundle)


@pytest.fixture(scope="session", params=["text", "image"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """The bundles `tiny-text` and `tiny-image` in turn."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def exact_logits() -> Callable[[Bundle], Logits]:
    """For a bundle: a function from T tokens to logits `[T, vocabulary]`, in PyTorch float64."""
    import torch

    from export.weights import load_decoder

    torch.set_num_threads(1)  # models this small are slower with threads

    def of(bundle: Bundle) -> Logits:
        model = load_decoder(bundle.folder).double()

        def logits(tokens: list[int]) -> npt.NDArray[np.float64]:
            with torch.no_grad():
                out: npt.NDArray[np.float64] = model(torch.tensor([tokens]))[0].numpy()
            return out

        return logits

    return of


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., DrivenModel]]:
    """Starts models. At the end, checks that those that still run hold nothing."""
    engines: list[DrivenModel] = []

    def start(bundle: Bundle, **settings: float) -> DrivenModel:
        settings = {"prefix_cache_bytes": 0, **settings}  # pushes whole prompts by default
        engines.append(DrivenModel(bundle, EngineConfig(threads=1, **settings)))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    try:
        for model in engines:
            if model.alive:
                await until(partial(is_empty, model), limit_s=10)
    finally:
        for model in engines:
            model.close()
