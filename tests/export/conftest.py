from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import export.bundle
from model.decoder import Decoder


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
    """Exports take seconds; here they copy what `fixed_bundle` holds."""

    def copy(model: Decoder, path: Path, data_type: int) -> None:
        shutil.copy(fixed_bundle / path.name, path)

    monkeypatch.setattr(export.bundle, "export_step", copy)
    monkeypatch.setattr(export.bundle, "export_fold", copy)
