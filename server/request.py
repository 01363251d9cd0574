"""Checks a request against its bundle and fills in every default, before a slot is taken."""

from __future__ import annotations

import math
import secrets

import numpy as np

from concertina.v1 import generation_service_pb2 as pb
from server.bundle import Bundle
from server.errors import InvalidRequest
from server.prompt import prompt_tokens
from server.sampler import SamplingParameters
from server.stream import Request

_MAX_STOPS = 16
_MAX_STOP_BYTES = 256
_MAX_SECONDS = 315_576_000_000  # what google.protobuf.Duration allows


def generate_request(bundle: Bundle, request: pb.GenerateRequest) -> Request:
    """A validated `GenerateRequest`. Raises InvalidRequest naming field, value and limit."""
    if request.HasField("prompt"):
        prompt = prompt_tokens(bundle, request.prompt, room=1)
    else:
        prompt = np.array([bundle.manifest.vocabulary])
    stopping, manifest = request.stopping, bundle.manifest
    left = bundle.context - (len(prompt) - 1)
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else left
    if not 1 <= max_tokens <= left:
        raise InvalidRequest(
            f"stopping.max_tokens is {max_tokens}; it must be between 1 and {left}: {bundle.name} "
            f"has a context of {bundle.context} tokens and the prompt takes {len(prompt) - 1}"
        )
    ends = manifest.HasField("end_token") and not stopping.ignore_eos
    return Request(
        prompt=prompt,
        sampling=_sampling(request.sampling),
        max_tokens=max_tokens,
        stop=_stop_strings(bundle, stopping),
        stop_tokens=_stop_tokens(bundle, stopping),
        end_token=manifest.end_token if ends else None,
        time_limit_s=_time_limit(stopping),
        complete_at=bundle.context if bundle.is_image else None,
    )


def score_request(bundle: Bundle, request: pb.ScoreRequest) -> Request:
    """A validated `ScoreRequest`. Raises InvalidRequest naming field, value and limit."""
    if request.prompt.WhichOneof("content") is None:
        raise InvalidRequest("prompt is empty: give the text, tokens or image to score")
    return Request(prompt=prompt_tokens(bundle, request.prompt, room=0), score=True)


def _sampling(sampling: pb.SamplingParameters) -> SamplingParameters:
    defaults = SamplingParameters(seed=secrets.randbits(63))

    def given(name: str) -> float:
        value = getattr(sampling if sampling.HasField(name) else defaults, name)
        return float(value)

    temperature, top_p, min_p = given("temperature"), given("top_p"), given("min_p")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidRequest(f"sampling.temperature is {temperature}; it must be finite and >= 0")
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"sampling.top_p is {top_p}; it must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise InvalidRequest(f"sampling.min_p is {min_p}; it must be between 0 and 1")
    return SamplingParameters(
        temperature=temperature,
        top_k=sampling.top_k,
        top_p=top_p,
        min_p=min_p,
        seed=sampling.seed if sampling.HasField("seed") else defaults.seed,
    )


def _stop_strings(bundle: Bundle, stopping: pb.StoppingCriteria) -> tuple[str, ...]:
    if stopping.stop and bundle.is_image:
        raise InvalidRequest(f"stopping.stop was given, but {bundle.name} makes images")
    if len(stopping.stop) > _MAX_STOPS:
        raise InvalidRequest(
            f"stopping.stop has {len(stopping.stop)} strings, the limit is {_MAX_STOPS}"
        )
    for index, stop in enumerate(stopping.stop):
        size = len(stop.encode())
        if not 1 <= size <= _MAX_STOP_BYTES:
            raise InvalidRequest(
                f"stopping.stop[{index}] has {size} bytes; it must have 1 to {_MAX_STOP_BYTES}"
            )
    return tuple(stopping.stop)


def _stop_tokens(bundle: Bundle, stopping: pb.StoppingCriteria) -> frozenset[int]:
    for index, token in enumerate(stopping.stop_token_ids):
        if token >= bundle.manifest.vocabulary:
            raise InvalidRequest(
                f"stopping.stop_token_ids[{index}] is {token}; "
                f"ids of {bundle.name} must be below {bundle.manifest.vocabulary}"
            )
    return frozenset(stopping.stop_token_ids)


def _time_limit(stopping: pb.StoppingCriteria) -> float | None:
    if not stopping.HasField("time_limit"):
        return None
    seconds = stopping.time_limit.seconds + stopping.time_limit.nanos / 1e9
    if not 0 < seconds <= _MAX_SECONDS:
        raise InvalidRequest(
            f"stopping.time_limit is {seconds} s; it must be above 0 and at most {_MAX_SECONDS}"
        )
    return seconds
