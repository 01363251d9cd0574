"""Makes the services of a server."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.api.generation import GenerationServicer
from server.api.health import HealthServicer
from server.api.models import ModelServicer
from server.api.sessions import SessionServicer
from server.auth.api_keys import Callers
from server.sessions.opener import SessionOpener
from server.sessions.registry import SessionRegistry
from server.sessions.served_model import ServedModel
from server.snapshots.writer import SnapshotWriter


@dataclass(frozen=True)
class Servicers:
    """The servicers of a server."""

    generation: GenerationServicer
    sessions: SessionServicer
    models: ModelServicer
    health: HealthServicer


def make_servicers(
    keys: Path | None,
    models: Mapping[str, ServedModel],
    snapshots: SnapshotWriter | None = None,
    draining: Collection[ServedModel] = (),
) -> Servicers:
    """The servicers over `models`, for callers with a key in the file `keys`; None serves anyone.

    draining: models that only finish their streams. Raises KeysError.
    """
    callers = Callers(keys)
    registry = SessionRegistry(models, snapshots, draining)
    opener = SessionOpener(registry)
    return Servicers(
        GenerationServicer(registry, opener, callers),
        SessionServicer(registry, opener, callers),
        ModelServicer(models, callers),
        HealthServicer(models),
    )
