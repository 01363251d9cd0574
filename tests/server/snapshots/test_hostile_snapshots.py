"""Snapshots that were damaged are refused; those that were forged with our own key do no harm."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import snapshot_pb2
from server.api.generation import send
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.errors import RequestError, SnapshotRefused
from tests.server.engines import is_empty, until
from tests.server.hostile import FORMS, Tally, examples, harmless, messages
from tests.server.replicas import SEALER, Replica

SOON_S = 10.0
EDGES: dict[str, tuple[float, ...]] = {
    "pushed": (0, 1, 7, 8, 9, 95, 96, 97, 2**63),
    "base_tokens": (0, 1, 95, 2**64 - 1),
    "base_characters": (0, 1, 95, 2**64 - 1),
    "output": (0, 1, 127, 2**32 - 1),
    "queue_seconds": (0, -1, math.nan, math.inf),
    "first_token_seconds": (0, -1, math.nan, math.inf),
}


class Forger:
    """Changes the content of a real snapshot, seals it correctly, and imports it."""

    def __init__(self, runner: asyncio.Runner, replica: Replica) -> None:
        self.runner = runner
        self.replica = replica
        self.sealed = {"paused": runner.run(self._make(20)), "finished": runner.run(self._make(0))}

    async def _make(self, paused_at: int) -> bytes:
        """A stream of 40 tokens, paused after some tokens or run to its end."""
        wanted = pb.GenerateRequest(
            prompt={"text": "An abacus"},
            sampling={"seed": 3, "repetition_penalty": 1.2},
            stopping={"max_tokens": 40, "ignore_eos": True},
            output={"logprobs": 1},
            keep={"seconds": 60},
        )
        attachment = await self.replica.start(wanted)
        session = attachment.session
        if paused_at:
            await until(lambda: session.streams[0].generated >= paused_at)
            await self.replica.model.pause(session)
        await until(lambda: session.ended)
        sealed = self.replica.snapshots.export(
            self.replica.model.bundle, session.lease, session.checkpoints
        )
        await self.replica.delete(session.lease.stream_id)
        return sealed

    def opened(self, kind: str) -> tuple[snapshot_pb2.SnapshotHeader, snapshot_pb2.Snapshot]:
        """A copy of the snapshot, to change."""
        return SEALER.open(self.sealed[kind], "")

    def bring(self, header: snapshot_pb2.SnapshotHeader, snapshot: snapshot_pb2.Snapshot) -> bool:
        """Imports it, reads its stream and deletes it. Returns whether it was accepted."""
        sealed = SEALER.seal(header, snapshot)
        return self.runner.run(asyncio.wait_for(self._bring(sealed), SOON_S))

    async def _bring(self, sealed: bytes) -> bool:
        try:
            snapshot = self.replica.snapshots.import_(sealed, "")
            stream_id = await self.replica.adopt(snapshot)
        except RequestError as error:
            assert error.status != "INTERNAL"
            assert harmless(error.message)
            assert is_empty(self.replica.model)
            return False
        attachment = await self.replica.resume(stream_id)
        async for event in send(attachment, 0, durable=True):
            assert event.error.code != "INTERNAL", event.error.message
            assert harmless(event.error.message)
        await self.replica.delete(stream_id)
        await until(lambda: is_empty(self.replica.model))
        return True


@pytest.fixture
def forger(text: Bundle, tmp_path: Any) -> Iterator[Forger]:
    """A forger with its own engine."""
    with ExitStack() as opened:
        runner = opened.enter_context(asyncio.Runner())
        config = EngineConfig(slots=4, threads=1)
        replica = Replica(text, config, f"file://{tmp_path}/store")
        opened.callback(replica.close)
        yield Forger(runner, replica)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_snapshots_are_refused(form: str, forger: Forger) -> None:
    """Cut at every byte, and with one bit of every byte changed; in the slow form, each bit."""
    sealed, tally = forger.sealed["paused"], Tally("damaged snapshots", form)
    rng = random.Random(1)
    for at in range(len(sealed)):
        damaged = [sealed[:at]]
        for bit in range(8) if form == "slow" else [rng.randrange(8)]:
            turned = bytearray(sealed)
            turned[at] ^= 1 << bit
            damaged.append(bytes(turned))
        for one in damaged:
            tally.cases += 1
            with pytest.raises(SnapshotRefused) as refused:
                forger.replica.snapshots.import_(one, "")
            assert harmless(refused.value.message)
    tally.close()


@pytest.mark.parametrize("form", FORMS)
def test_forged_snapshots_do_no_harm(form: str, forger: Forger) -> None:
    taken = 0

    def forge(kind: str, data: st.DataObject) -> None:
        nonlocal taken
        header, snapshot = forger.opened(kind)
        for _ in range(data.draw(st.integers(1, 2))):
            _forge(header, snapshot, data)
        taken += forger.bring(header, snapshot)

    examples(
        Tally("forged snapshots", form), [st.sampled_from(["paused", "finished"]), st.data()], forge
    )
    assert taken  # some forgeries are valid snapshots


def _forge(
    header: snapshot_pb2.SnapshotHeader, snapshot: snapshot_pb2.Snapshot, data: st.DataObject
) -> None:
    output = snapshot.outputs[0] if snapshot.outputs else snapshot.outputs.add()
    match data.draw(st.integers(0, 9)):
        case 0:
            field = data.draw(st.sampled_from([*EDGES]))
            setattr(output, field, data.draw(st.sampled_from(EDGES[field])))
        case 1:
            name = data.draw(st.sampled_from([*output.state, "other"]))
            harm = data.draw(st.sampled_from(["gone", "short", "odd", "nan", "inf", "long"]))
            _harm(output, name, harm)
        case 2:
            output.generated = data.draw(st.binary(max_size=200))
        case 3:
            output.finish.CopyFrom(data.draw(messages(snapshot_pb2.StoredFinish)))
        case 4:
            output.ClearField("finish")
        case 5:
            del output.logprobs[data.draw(st.integers(0, 3)) :]
        case 6:
            snapshot.request.MergeFrom(data.draw(messages(snapshot_pb2.StoredRequest)))
        case 7:
            snapshot.outputs.add().CopyFrom(data.draw(messages(snapshot_pb2.OutputSnapshot)))
        case 8:
            snapshot.ClearField(data.draw(st.sampled_from(["request", "outputs"])))
        case _:
            header.MergeFrom(data.draw(messages(snapshot_pb2.SnapshotHeader)))


def _harm(output: snapshot_pb2.OutputSnapshot, name: str, harm: str) -> None:
    content = output.state[name]
    match harm:
        case "gone":
            del output.state[name]
        case "short":
            output.state[name] = content[:-4]
        case "odd":
            output.state[name] = content[:-1]
        case "long":
            output.state[name] = content * 2
        case _:
            values = np.frombuffer(content[: len(content) // 4 * 4], "<f4").copy()
            values[:] = float(harm)
            output.state[name] = values.tobytes()
