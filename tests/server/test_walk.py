"""From the door to the step: the files that one Generate request walks through."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import grpc

from concertina.v1 import generation_service_pb2 as pb
from server.api.servicers import make_servicers
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.sessions.served_model import ServedModel
from tests.server.engines import is_empty, until

ROOT = Path(__file__).parents[2]
MOST = 10
# Where the request is handed over, where the engine's thread takes it in, and where it is computed.
LANDMARKS = {"Engine.admit", "StreamLifecycle.enqueue", "Runtime.step"}


class Call:
    """A call of anybody."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return ()

    def set_code(self, code: grpc.StatusCode) -> None:
        raise AssertionError(code)

    def set_trailing_metadata(self, trailing_metadata: object) -> None:
        pass

    def set_details(self, details: str) -> None:
        raise AssertionError(details)


def files(frame: FrameType | None) -> Iterator[str]:
    """Files of ours on the call stack, innermost first, down to the handler."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "server"):
            yield path.relative_to(ROOT).as_posix()
        frame = frame.f_back


async def walk(bundle: Bundle) -> dict[str, list[str]]:
    """By landmark, the call stack when a request first reaches it."""
    stacks: dict[str, list[str]] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := frame.f_code.co_qualname) in LANDMARKS - stacks.keys():
            stacks[name] = [*dict.fromkeys(files(frame))][::-1]

    threading.setprofile(profile)  # of threads that start from now on
    try:
        model = ServedModel(bundle, EngineConfig(threads=1))
    finally:
        threading.setprofile(None)
    try:
        handler = make_servicers(None, {bundle.name: model}).generation
        request = pb.GenerateRequest(stopping={"max_tokens": 3})
        sys.setprofile(profile)
        try:
            events = [event async for event in handler.Generate(request, Call())]
        finally:
            sys.setprofile(None)
        assert events[-1].HasField("finished")
        await until(lambda: is_empty(model))
    finally:
        model.close()
    return stacks


async def test_a_request_walks_through_few_files(text: Bundle) -> None:
    stacks = await walk(text)
    assert stacks.keys() == LANDMARKS
    walked = list(dict.fromkeys(file for stack in stacks.values() for file in stack))
    assert walked[0] == "server/api/generation.py"
    assert walked[-1] == "server/runtime/onnx_session.py"
    assert len(walked) <= MOST, walked
    section = re.search(
        r"## The walk of one request\n(.*?)\n## ", (ROOT / "ARCHITECTURE.md").read_text(), re.S
    )
    assert section is not None
    named = list(dict.fromkeys(re.findall(r"`(server/\w+/\w+\.py)`", section[1])))
    assert named == walked
