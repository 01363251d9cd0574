"""Every field of every request has its bounds, which hold, whoever sends it and however."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api.limits import largest_bytes, limits_of, needs_limits, require_within_limits
from server.api.servicers import make_servicers
from server.api.wire import reader
from server.auth.api_keys import Caller, new_key, write_keys
from server.config import EngineConfig, ServeConfig
from server.errors import InvalidRequest
from server.hosts.local import make_server
from server.ops.ports import free_ports
from server.request import LONGEST_BAD_WORD, LONGEST_KEEP_S
from server.sessions.served_model import serve_bundles
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.api.bounds import Case, cases, methods, places
from tests.server.engines import LIMIT_S

KINDS = {method.input_type.name: method.input_type for method in methods()}
SHORT = 300


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_no_field_is_forgotten(kind: Descriptor) -> None:
    assert largest_bytes(kind) > 0
    for place in places(kind):
        field = place.path[-1]
        if not needs_limits(field):
            continue
        limits = limits_of(field)
        assert limits is not None, f"{place.name} of {kind.name} has no bound"
        if field.is_repeated:
            assert limits.max_items, f"{place.name} may have any number of items"
        text = field.cpp_type == field.CPPTYPE_STRING
        given = limits.max_bytes if text else any(map(limits.HasField, ("min", "above", "max")))
        assert given or limits.any or (field.is_repeated and not text), f"{place.name} is unbound"


def test_the_bounds_that_the_engine_relies_on() -> None:
    sampling, keep = pb.SamplingParameters.DESCRIPTOR, pb.GenerateRequest.DESCRIPTOR
    words = limits_of(sampling.fields_by_name["bad_words"])
    longest = limits_of(keep.fields_by_name["keep"])
    assert words is not None and words.max_bytes == LONGEST_BAD_WORD
    assert longest is not None and longest.max == LONGEST_KEEP_S


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_value_at_its_bound_passes_and_one_beyond_does_not(kind: Descriptor) -> None:
    read = reader(kind)
    for case in cases(kind):
        content = case.request.SerializeToString()
        if case.is_right:
            assert len(content) <= largest_bytes(kind)
        try:
            require_within_limits(read(content))
        except InvalidRequest as error:
            assert not case.is_right, error.message
            assert (error.field, error.limit) == (case.field, case.limit), error.message
            assert case.field in error.message and len(error.message) < SHORT
        else:
            assert case.is_right, f"{case.field} passes"


def test_the_fuzz_tries_every_field() -> None:
    tried = {(kind.name, case.field.partition("[")[0]) for kind in KINDS.values()
             for case in cases(kind) if not case.is_right}  # fmt: skip
    assert len(tried) > 40


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (pb.GenerateRequest(model="m" * 300), "model", "model has 300 bytes; the limit is 256"),
        (session_pb.ForkRequest(), "n", "n is 0; it must be between 1 and 128"),
        (
            pb.ResumeRequest(cursors=[{}, {"tokens": 2**41}]),
            "cursors[1].tokens",
            "cursors[1].tokens is 2199023255552; it must be at most 1099511627776",
        ),
        (
            pb.GenerateRequest(stopping={"stop": ["x", ""]}),
            "stopping.stop[1]",
            "stopping.stop[1] has 0 bytes; it must have 1 to 256",
        ),
    ],
    ids=["bytes", "left out", "of a list", "of an item"],
)
def test_an_error_names_field_value_and_limit(request_: Message, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        require_within_limits(request_)
    assert raised.value.field == field
    assert raised.value.message.startswith(message)


@pytest.fixture
async def closed(
    text_bundle: Path, image_bundle: Path, tmp_path: Path
) -> AsyncIterator[tuple[grpc.aio.Channel, str]]:
    """A channel to a server with keys, and a secret of it."""
    key, secret = new_key(Caller("writer"))
    write_keys(tmp_path / "keys.json", [key])
    writer = SnapshotWriter(Store(f"file://{tmp_path}/store"), Sealer.for_this_process(), 60.0)
    models = serve_bundles([text_bundle, image_bundle], EngineConfig(threads=1), writer)
    (port,) = free_ports(1)
    config = ServeConfig((text_bundle,), port=port, keys=tmp_path / "keys.json")
    server = make_server(config, make_servicers(config.keys, models, writer))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(config.address) as channel:
            yield channel, secret
    finally:
        await server.stop(None)
        for model in models.values():
            model.close()
        writer.close(LIMIT_S)


async def test_every_method_refuses_what_is_beyond_a_bound(
    closed: tuple[grpc.aio.Channel, str],
) -> None:
    channel, secret = closed
    known = (("authorization", f"Bearer {secret}"),)
    for method in methods():
        path = f"/{method.containing_service.full_name}/{method.name}"
        for case in [each for each in cases(method.input_type) if not each.is_right]:
            async with asyncio.timeout(LIMIT_S):
                assert await _refusal(channel, path, case, ()) == "UNAUTHENTICATED"
                assert await _refusal(channel, path, case, known) == "INVALID_ARGUMENT"


async def _refusal(channel: grpc.aio.Channel, path: str, case: Case, metadata: Any) -> str:
    """The status that a call ends with; if it is of a wrong field, that must be the right one."""

    async def content() -> AsyncIterator[bytes]:
        yield case.request.SerializeToString()

    call: Any = channel.stream_stream(path)(content(), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    if raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT:
        told = dict(raised.value.trailing_metadata())["concertina-error-bin"]
        error = pb.Error.FromString(told)
        limit = error.limit if error.HasField("limit") else None
        assert (error.field, limit, error.retryable) == (case.field, case.limit, False), path
    return raised.value.code().name
