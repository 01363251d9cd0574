"""What earlier builds stored still opens: `fixtures/` has what each format looked like.

Each folder has a stream of the tiny text bundle, paused after 23 of 40 tokens, as a server exported
it, and as it lay in the store. It was sealed with `KEY`, and expires after the year 7000.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint, FinishReason
from server.request import Lease, LogitsProcessors
from server.snapshots.codec import Snapshot, restored
from server.snapshots.sealer import READ_VERSIONS, VERSION, Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter

FIXTURES = Path(__file__).parent / "fixtures"
KEY = bytes(range(32))
STREAM_ID = "074cacfa685180ec2e3da76be3e8c0cc"
GENERATED = bytes.fromhex("c89760a9db0747effe0d1da4268eacc4c42af6e8060ec0")


def fixture(version: int) -> dict[str, bytes]:
    """What a format looked like, by name."""
    return {path.name: path.read_bytes() for path in (FIXTURES / f"version-{version}").iterdir()}


def opened(text: Bundle, snapshot: Snapshot) -> tuple[Lease, Checkpoint]:
    """The stream; the tiny bundle is not the same to the bit on every machine."""
    snapshot.header.fingerprint = text.fingerprint
    lease, (checkpoint,) = restored(text, snapshot)
    return lease, checkpoint


def require_story(lease: Lease, checkpoint: Checkpoint) -> None:
    (request,) = lease.requests
    assert (lease.keep_s, lease.owner) == (60, "")
    assert bytes(request.prompt.tokens) == b"An abacus"
    assert (request.max_tokens, request.stop) == (40, ("~~~",))
    assert (request.sampling.seed, request.sampling.logprobs) == (3, 1)
    penalty = np.float32(1.2)
    assert request.sampling.processors == LogitsProcessors(
        bias=((65, 1.5),), repetition_penalty=float(penalty)
    )
    assert checkpoint.generated.tobytes() == GENERATED
    assert len(checkpoint.logprobs) == len(GENERATED)
    assert checkpoint.finish is not None
    assert checkpoint.finish.reason is FinishReason.PAUSED
    assert checkpoint.saved is not None
    assert checkpoint.saved.pushed == 32
    shapes = {"keys": (2, 4, 16), "values": (2, 4, 16), "pooled_query": (2, 16)}
    assert {name: values.shape for name, values in checkpoint.saved.state.items()} == {
        f"{name}.{layer}": shape for name, shape in shapes.items() for layer in (0, 1)
    }


def test_there_is_a_fixture_of_each_format() -> None:
    assert VERSION in READ_VERSIONS
    assert {folder.name for folder in FIXTURES.iterdir()} == {
        f"version-{version}" for version in READ_VERSIONS
    }


@pytest.mark.parametrize("version", READ_VERSIONS)
def test_what_was_exported_is_imported(version: int, text: Bundle, tmp_path: Path) -> None:
    writer = SnapshotWriter(Store(f"file://{tmp_path}"), Sealer([KEY]), 60.0)
    snapshot = writer.import_(fixture(version)["exported"], "")
    assert snapshot.header.version == version
    lease, checkpoint = opened(text, snapshot)
    require_story(lease, checkpoint)
    writer.close(0)


@pytest.mark.parametrize("version", READ_VERSIONS)
def test_what_was_stored_is_loaded(version: int, text: Bundle, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    for name, content in fixture(version).items():
        if name != "exported":
            store.create("", STREAM_ID, name, content)
    writer = SnapshotWriter(store, Sealer([KEY]), 60.0)
    snapshot = writer.load("", STREAM_ID)
    assert snapshot is not None
    lease, checkpoint = opened(text, snapshot)
    require_story(lease, checkpoint)
    assert (lease.stream_id, lease.epoch) == (STREAM_ID, 1)
    writer.begin(text, replace(lease, epoch=2), [checkpoint])
    again = writer.load("", STREAM_ID)
    assert again is not None
    require_story(*opened(text, again))
    writer.close(0)
