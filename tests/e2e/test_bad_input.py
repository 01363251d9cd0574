"""Whatever is sent: the right status, a message that helps and gives nothing away, and no harm."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import grpc
import pytest
from PIL import Image

from concertina.client import Client
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from tests.bundles import HEIGHT, PALETTE, WIDTH
from tests.e2e.conftest import CONTEXT
from tests.e2e.servers import Server

TEXT, IMAGE = "long-text", "tiny-image"
SOON = 20.0
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
JUNK = bytes(range(256)) * 16_000
LEAK = re.compile(r"Traceback|File \"|\.py\b|pid[ =]|\x1b|0x[0-9a-f]{6}|(?<!\w)/(?:\w+/)+\w")


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height)).save(content, format="PNG")
    return content.getvalue()


def text(content: str) -> pb.Prompt:
    return pb.Prompt(text=content)


def tokens(*ids: int) -> pb.Prompt:
    return pb.Prompt(tokens=pb.TokenIds(ids=ids))


def image(**rows: bytes) -> pb.Prompt:
    return pb.Prompt(image=pb.ImageRows(**rows))


def sampling(**values: float) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=TEXT, sampling=pb.SamplingParameters(**values))


def stopping(**values: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=TEXT, stopping=pb.StoppingCriteria(**values))


def prompt(prompt: pb.Prompt, model: str = TEXT) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt=prompt)


BAD = {
    "unknown model": (pb.GenerateRequest(model="nope"), NOT_FOUND, "model .*'nope'.*long-text"),
    "no model of two": (pb.GenerateRequest(), NOT_FOUND, "model is empty.*long-text"),
    "empty prompt": (prompt(pb.Prompt()), INVALID, "prompt is empty"),
    "empty text": (prompt(text("")), INVALID, "prompt.text is empty"),
    "no tokens": (prompt(tokens()), INVALID, "prompt.tokens.ids is empty"),
    "long text": (prompt(text("x" * CONTEXT)), INVALID, f"{CONTEXT}.*limit is {CONTEXT - 1}"),
    "many tokens": (prompt(tokens(*[1] * CONTEXT)), INVALID, f"limit is {CONTEXT - 1}"),
    "token out of range": (prompt(tokens(1, 256)), INVALID, r"ids\[1\] is 256.*below 256"),
    "huge token": (prompt(tokens(2**32 - 1)), INVALID, r"ids\[0\] is 4294967295.*below 256"),
    "text for an image": (prompt(text("x"), IMAGE), INVALID, "prompt.text"),
    "an image for text": (prompt(image(png=png(8, 4))), INVALID, "prompt.image"),
    "empty image": (prompt(pb.Prompt(image=pb.ImageRows()), IMAGE), INVALID, "prompt.image"),
    "not a PNG": (prompt(image(png=b"GIF89a"), IMAGE), INVALID, "prompt.image.png"),
    "half a PNG": (prompt(image(png=png(8, 4)[:45]), IMAGE), INVALID, "prompt.image.png"),
    "too wide": (prompt(image(png=png(9, 4)), IMAGE), INVALID, r"prompt.image.png.*9.*8"),
    "too high": (prompt(image(png=png(8, 9)), IMAGE), INVALID, "9.*8"),
    "whole image": (prompt(image(png=png(WIDTH, HEIGHT)), IMAGE), INVALID, "64.*63|8.*7"),
    "half a row": (prompt(image(rgb=bytes(PALETTE[0]) * 4), IMAGE), INVALID, "prompt.image.rgb"),
    "unknown label": (prompt(pb.Prompt(label="x"), IMAGE), INVALID, "prompt.label is 'x'.*star"),
    "NaN temperature": (sampling(temperature=float("nan")), INVALID, "temperature is nan"),
    "infinite temperature": (sampling(temperature=float("inf")), INVALID, "temperature is inf"),
    "negative temperature": (sampling(temperature=-1), INVALID, "temperature is -1.0"),
    "top_p of 0": (sampling(top_p=0), INVALID, "top_p is 0.0"),
    "top_p above 1": (sampling(top_p=1.5), INVALID, "top_p is 1.5.*1"),
    "min_p above 1": (sampling(min_p=2), INVALID, "min_p is 2.0.*1"),
    "max_tokens of 0": (stopping(max_tokens=0), INVALID, "max_tokens is 0"),
    "beyond the context": (
        stopping(max_tokens=CONTEXT + 1),
        INVALID,
        f"max_tokens is {CONTEXT + 1}.*{CONTEXT}",
    ),
    "1 MB of text": (prompt(text("junk" * 250_000)), INVALID, f"1000000.*{CONTEXT - 1}"),
    "4 MB of text": (prompt(text("junk" * 1_000_000)), INVALID, r"prompt.text.*4000000.*1048576"),
    "4 MB of ids": (prompt(tokens(*[1] * 4_000_000)), INVALID, "ids has 4000000.*1048576"),
    "4 MB of png": (prompt(image(png=JUNK), IMAGE), INVALID, "prompt.image.png.*1048576"),
    "1 MB of png": (prompt(image(png=JUNK[:1_000_000]), IMAGE), INVALID, "prompt.image.png"),
    "4 MB of rgb": (prompt(image(rgb=JUNK), IMAGE), INVALID, "prompt.image.rgb.*3145728"),
    "4 MB of name": (pb.GenerateRequest(model="m" * 4_000_000), INVALID, "model has 4000000.*256"),
    "a long name": (pb.GenerateRequest(model="m" * 256), NOT_FOUND, "model 'mmm"),
}


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def refused(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Status of a call that failed; its message must not speak of the server's inside."""
    details = str(error.details())
    assert not LEAK.search(details), details
    return error.code(), details


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str, server: Server, channel: grpc.Channel) -> None:
    request, status, message = BAD[name]
    started = server.metric("concertina_stream_queue_time_seconds_count")
    stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(request, timeout=SOON))
    code, details = refused(raised.value)
    assert code == status
    assert re.search(message, details), details
    assert len(details) < 1000
    assert server.metric("concertina_stream_queue_time_seconds_count") == started


def test_bad_unary_calls_are_refused(channel: grpc.Channel) -> None:
    generation = generation_service_pb2_grpc.GenerationServiceStub(channel)
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    for call, request, status in (
        (generation.Score, pb.ScoreRequest(model=TEXT), INVALID),
        (generation.Score, pb.ScoreRequest(model="nope", prompt=text("x")), NOT_FOUND),
        (generation.Score, pb.ScoreRequest(model=TEXT, prompt=tokens(999)), INVALID),
        (models.GetModel, model_service_pb2.GetModelRequest(model="nope"), NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call(request, timeout=SOON)
        code, details = refused(raised.value)
        assert code == status
        assert details


def test_what_is_not_even_a_request(channel: grpc.Channel) -> None:
    unknown, undecodable = grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL
    for path, content, codes in (
        ("GenerationService/Generate", b"\xff" * 1000, {unknown, undecodable}),
        ("GenerationService/Score", JUNK, {unknown, undecodable}),
        ("GenerationService/Score", JUNK * 2, {grpc.StatusCode.RESOURCE_EXHAUSTED}),
        ("GenerationService/Nothing", b"", {grpc.StatusCode.UNIMPLEMENTED}),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(f"/concertina.v1.{path}")(content, timeout=SOON)
        code, _ = refused(raised.value)
        assert code in codes, path


def test_the_server_keeps_serving(client: Client) -> None:
    events = list(client.generate("x", model=TEXT, max_tokens=8, ignore_eos=True, timeout=SOON))
    assert len(events) >= 3
