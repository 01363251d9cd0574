"""All bugs: those that an incremental decoder of a Combiner invites."""

from __future__ import annotations

from tests.mutants import (
    client,
    export,
    model,
    patterns,
    pixels,
    same_bits,
    server,
    snapshots,
    vocabularies,
)

MUTANTS = (
    *patterns.MUTANTS,
    *model.MUTANTS,
    *pixels.MUTANTS,
    *export.MUTANTS,
    *client.MUTANTS,
    *server.MUTANTS,
    *same_bits.MUTANTS,
    *snapshots.MUTANTS,
    *vocabularies.MUTANTS,
)
