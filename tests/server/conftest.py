"""Bundles as the server sees them, and the models they were exported from."""

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
    """Each of them in turn."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def exact_logits() -> Callable[[Bundle], Logits]:
    """For a bundle: logits `[T, vocabulary]` after each of T tokens, by PyTorch, in float64."""
    import torch

    from export.weights import load_decoder

    torch.set_num_threads(1)  # on models this small, threads only wait for each other

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
    """Starts engines; in the end nothing may be left in any that still runs."""
    engines: list[DrivenModel] = []

    def start(bundle: Bundle, **settings: float) -> DrivenModel:
        settings = {"prefix_cache_bytes": 0, **settings}  # prompts are pushed whole, unless asked
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
