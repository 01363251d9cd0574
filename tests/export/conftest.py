from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import export.bundle
from export.graphs import Units
from model.data import Dataset
from model.decoder import Decoder
from model.run import load_checkpoint
from tests.checkpoints import checkpoint_of


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to threads waiting for each other than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copied(fixed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `fixed_bundle` to damage."""
    return Path(shutil.copytree(fixed_bundle, tmp_path / "copied"))


@pytest.fixture
def ready_graphs(fixed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take seconds; here they copy what `fixed_bundle` holds, but for int8 caches."""
    copy_graphs(fixed_bundle, monkeypatch)


def copy_graphs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports copy what `bundle` holds, but for int8 caches."""
    for part in ("step", "fold"):
        written = getattr(export.bundle, f"export_{part}")

        def copy(
            model: Decoder,
            path: Path,
            data_type: int,
            *units: Units,
            write: Any = written,
            **_: Any,
        ) -> None:
            if units:
                write(model, path, data_type, *units)
            else:
                shutil.copy(bundle / path.name, path)

        monkeypatch.setattr(export.bundle, f"export_{part}", copy)


@pytest.fixture(scope="package")
def heldout(fixed_bundle: Path) -> Dataset:
    """Images that the model of `fixed_bundle` itself painted, so that any other is worse."""
    checkpoint = load_checkpoint(checkpoint_of(fixed_bundle))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.full((12, 1), checkpoint.data.vocabulary)
    with torch.no_grad():
        while tokens.shape[1] < 33:
            chances = checkpoint.model(tokens)[:, -1].softmax(-1)
            tokens = torch.cat((tokens, chances.multinomial(1, generator=generator)), dim=1)
    images = tokens.numpy()
    images[:, 0] = -1
    return Dataset(checkpoint.data, images, images)
