"""All bugs: those that an incremental decoder of a Combiner invites."""

from __future__ import annotations

from tests.mutants import (
    bench,
    client,
    examples,
    export,
    grammars,
    http_api,
    limits,
    load,
    model,
    page,
    patterns,
    pixels,
    same_bits,
    sampling,
    server,
    snapshots,
    vocabularies,
)

MUTANTS = (
    *patterns.MUTANTS,
    *model.MUTANTS,
    *page.MUTANTS,
    *pixels.MUTANTS,
    *export.MUTANTS,
    *client.MUTANTS,
    *examples.MUTANTS,
    *server.MUTANTS,
    *limits.MUTANTS,
    *grammars.MUTANTS,
    *http_api.MUTANTS,
    *same_bits.MUTANTS,
    *sampling.MUTANTS,
    *snapshots.MUTANTS,
    *bench.MUTANTS,
    *load.MUTANTS,
    *vocabularies.MUTANTS,
)
