"""Runs in another process: continues every stream of a store, one after the other."""

from __future__ import annotations

import asyncio
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.arrays import Floats, Ints
from server.auth.api_keys import ANYONE
from server.bundles.bundle import load_bundle
from server.checkpoint import Finish, FinishReason
from server.config import EngineConfig
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.reviver import resume
from server.sessions.served_model import ServedModel
from server.sessions.subscriber import Delta
from server.snapshots.opening import open_writer

LIMIT_S = 60.0
CONFIG = EngineConfig(
    slots=2, threads=1, prefill_chunk=1, prefix_cache_bytes=0, snapshot_interval=1_000_000
)


@dataclass
class Recording:
    """The output of a stream, and the bytes of its logits by position."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: tuple[FinishReason, int] | None = None
    logits: dict[int, bytes] = field(default_factory=dict)


def record_logits(model: ServedModel, logits: dict[int, bytes]) -> None:
    """Records the logits of each step of a batch of one stream, by position."""
    runtime: Any = model.engine.runtime
    step = type(runtime).step

    def recorded(tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        assert len(tokens) == 1
        out: Floats = step(runtime, tokens, positions, lengths)
        logits[int(positions[0])] = out.tobytes()
        return out

    runtime.step = recorded


async def read(attachment: Attachment, recording: Recording) -> None:
    """Reads a stream of one output to its end."""
    model, session = attachment.model, attachment.session
    async with asyncio.timeout(LIMIT_S):
        async for _, event in model.events(session, attachment.subscribers):
            match event:
                case Delta():
                    recording.tokens += event.tokens
                    recording.text += event.text
                case Finish():
                    recording.end = event.reason, event.generated
                case other:
                    raise AssertionError(other)


async def restore(folder: Path, uri: str) -> dict[str, Recording]:
    """The recordings of all streams in the store at `uri`, read from the beginning, by name."""
    bundle, writer = load_bundle(folder), open_writer(uri, 60.0)
    assert writer is not None
    model = ServedModel(bundle, CONFIG)
    registry = SessionRegistry({bundle.name: model}, writer)
    recording = {}
    try:
        for name in await registry.stored(""):
            recording[name] = Recording()
            record_logits(model, recording[name].logits)
            await read(await resume(registry, name, ANYONE, ()), recording[name])
    finally:
        model.close()
        writer.close(LIMIT_S)
    return recording


def main() -> None:
    """Writes the pickled recordings to the standard output."""
    sys.stdout.buffer.write(pickle.dumps(asyncio.run(restore(Path(sys.argv[1]), sys.argv[2]))))
