"""All bugs: those that an incremental decoder of a Combiner invites."""

from __future__ import annotations

from tests.mutants import (
    client,
    export,
    model,
    patterns,
    pixels,
    same_bits,
    sampling,
    server,
    snapshots,
)

MUTANTS = (
    *patterns.MUTANTS,
    *model.MUTANTS,
    *pixels.MUTANTS,
    *export.MUTANTS,
    *client.MUTANTS,
    *server.MUTANTS,
    *same_bits.MUTANTS,
    *sampling.MUTANTS,
    *snapshots.MUTANTS,
)
