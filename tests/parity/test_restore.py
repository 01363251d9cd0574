"""A stream that is stored at any position continues in another process without a difference.

Tokens, text, and the logits of every step after the snapshot are equal to the bit.
"""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from concertina.v1 import generation_service_pb2 as pb
from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import Checkpoint
from server.sessions.opener import SessionOpener
from server.sessions.registry import SessionRegistry
from server.sessions.served_model import ServedModel
from server.snapshots.opening import open_writer
from server.snapshots.sealer import KEY_VARIABLE
from server.snapshots.writer import SnapshotWriter
from tests.checkpoints import NARROWED, export_tiny, narrow_tiny, quantise_tiny
from tests.parity.conftest import marked
from tests.parity.restoring import CONFIG, LIMIT_S, Recording, read, record_logits
from tests.server.replicas import start

ROOT = Path(__file__).parents[2]
SPAN = 8
LAST = 2 * SPAN + 1
PENALTIES = {
    "seed": 5,
    "repetition_penalty": 1.6,
    "presence_penalty": 0.9,
    "frequency_penalty": 0.7,
    "logit_bias": {2: -1.0},
}
CASES: dict[str, dict[str, Any]] = {
    "sampled": {"sampling": {"seed": 3}},
    "greedy": {"sampling": {"temperature": 0}},
    "penalised": {"sampling": PENALTIES},
    "prompted": {"sampling": {"seed": 4}, "prompt": {"tokens": {"ids": [5, 0, 3, 3, 1, 6] * 4}}},
    "prompted-penalised": {"sampling": PENALTIES, "prompt": {"tokens": {"ids": [1, 4, 4, 2, 0]}}},
}


def record_checkpoints(model: ServedModel, checkpoints: dict[int, Checkpoint]) -> None:
    """Records the checkpoint of the only stream before each pass, by number of pushed tokens."""
    runtime: Any = model.engine.runtime

    def recording(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            placement = model.engine.placement
            stream = placement.prefilling if name == "prefill" else placement.running[0]
            assert stream is not None
            saved = placement.save(stream)
            assert saved is not None
            checkpoints[saved.pushed] = replace(stream.checkpoint, saved=saved)
            return run(*args)

        return recorded

    for name in ("step", "prefill"):
        setattr(runtime, name, recording(name, getattr(runtime, name)))


def positions(bundle: Bundle, prompt: int) -> list[int]:
    """Where a stream stands before each pass of two blocks, with a limit of one prompt token."""
    chunk = (bundle.span or 2) if bundle.pairs_rows else 1
    return sorted({*range(0, min(prompt, LAST + 1), chunk), *range(prompt, LAST + 1)})


async def undisturbed(
    model: ServedModel, writer: SnapshotWriter, name: str, request: pb.GenerateRequest
) -> tuple[Recording, list[str]]:
    """Runs a stream to its end, and stores a checkpoint for each position of two blocks.

    Returns the names of what it has stored, too.
    """
    recording, checkpoints = Recording(), dict[int, Checkpoint]()
    record_logits(model, recording.logits)
    record_checkpoints(model, checkpoints)
    opener = SessionOpener(SessionRegistry({"": model}))
    attachment = await start(opener, model, request)
    await read(attachment, recording)
    await model.forget(attachment.session)
    stops = positions(model.bundle, len(attachment.session.streams[0].request.prompt))
    assert sorted(checkpoints.keys() & set(range(LAST + 1))) == stops
    for pushed in stops:
        lease = replace(attachment.session.lease, stream_id=f"{name}-{pushed}")
        writer.begin(model.bundle, lease)
        writer.offer(model.bundle, lease, 0, checkpoints[pushed])
    return recording, [f"{name}-{pushed}" for pushed in stops]


@pytest.mark.parametrize(
    "bits", [16, *(pytest.param(few, marks=pytest.mark.slow) for few in (8, 4))]
)
async def test_streams_continue_to_the_bit_from_every_position_of_two_blocks(
    bundle: Path, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle if bits == 16 else quantise_tiny(bundle, bits)
    await continues_to_the_bit(bundle, tmp_path, monkeypatch)


@pytest.mark.parametrize("pattern", marked([*NARROWED]))
async def test_streams_with_int8_caches_continue_likewise(
    pattern: str, tiny_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = narrow_tiny(export_tiny(tiny_bundles, pattern))
    await continues_to_the_bit(bundle, tmp_path, monkeypatch)


async def continues_to_the_bit(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(os.urandom(32)).decode())
    uri = f"file://{tmp_path}/store"
    writer, model = open_writer(uri, 60.0), ServedModel(load_bundle(bundle), CONFIG)
    assert writer is not None
    expected, stored = {}, list[str]()
    try:
        for name, fields in CASES.items():
            request = pb.GenerateRequest(
                **fields, keep={"seconds": 600}, stopping={"ignore_eos": True}
            )
            expected[name], names = await undisturbed(model, writer, name, request)
            stored += names
        assert writer.flush(LIMIT_S) == 0
    finally:
        model.close()
        writer.close(LIMIT_S)
    recording = restored(bundle, uri)
    assert sorted(recording) == sorted(stored)
    for key, got in recording.items():
        name, _, at = key.rpartition("-")
        whole = expected[name]
        assert (got.tokens, got.text, got.end) == (whole.tokens, whole.text, whole.end), key
        rest = {pos: bits for pos, bits in whole.logits.items() if pos >= int(at)}
        assert rest
        assert got.logits == rest, key


def restored(bundle: Path, uri: str) -> dict[str, Recording]:
    """The recordings of another process that continues the streams in the store."""
    command = "from tests.parity.restoring import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, str(bundle), uri],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stdout=subprocess.PIPE,
        timeout=2 * LIMIT_S,
        check=True,
    )
    recording: dict[str, Recording] = pickle.loads(done.stdout)
    return recording
