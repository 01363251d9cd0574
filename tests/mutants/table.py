"""All bugs: those that an incremental decoder of a Combiner invites."""

from __future__ import annotations

from tests.mutants import export, model, patterns, pixels, server

MUTANTS = (*patterns.MUTANTS, *model.MUTANTS, *export.MUTANTS, *server.MUTANTS, *pixels.MUTANTS)
