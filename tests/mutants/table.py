"""All bugs: those that an incremental decoder of a Combiner invites."""

from __future__ import annotations

from tests.mutants import export, model, patterns, server, snapshots

MUTANTS = (
    *patterns.MUTANTS,
    *model.MUTANTS,
    *export.MUTANTS,
    *server.MUTANTS,
    *snapshots.MUTANTS,
)
