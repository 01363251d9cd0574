"""Opens the store of a server, and finds out whether it works."""

from __future__ import annotations

from concertina.machine import share_of_memory
from server.config import ConfigError
from server.snapshots.sealer import KEY_VARIABLE, Sealer
from server.snapshots.store import Store
from server.snapshots.writer import WAITING_BYTES, SnapshotWriter


def open_writer(
    uri: str, ttl_s: float, optional: bool = False, replicas: int = 1
) -> SnapshotWriter | None:
    """The writer to the store at `uri`; None for an empty one. Raises as `open_store` does.

    replicas: processes of this machine that have a writer each, and share its memory.
    """
    opened = open_store(uri, optional)
    if opened is None:
        return None
    writer = SnapshotWriter(*opened, ttl_s, share_of_memory(WAITING_BYTES, replicas))
    if optional:
        writer.look()
    return writer


def open_store(uri: str, optional: bool = False) -> tuple[Store, Sealer] | None:
    """The store at `uri`, and what seals its contents; None for an empty one.

    Raises ConfigError: for a store that others reach, the environment has to hold a key; and the
    store has to work now, unless it is `optional`.
    """
    if not uri:
        return None
    store, sealer = Store(uri), Sealer.from_environment()
    if sealer is None:
        if store.is_shared:
            raise ConfigError(
                f"snapshots is {uri!r}, and {KEY_VARIABLE} is not set: snapshots hold what users "
                "wrote, and are sealed; make a key with: openssl rand -base64 32"
            )
        sealer = Sealer.for_this_process()
    if not optional:
        try:
            store.probe()
        except OSError as error:
            raise ConfigError(
                f"snapshots is {uri!r}, which cannot be used ({type(error).__name__}: {error}); "
                "mend it, or start with --snapshots-optional: streams then run, and do not survive "
                "the server until the store is there"
            ) from None
    return store, sealer
