"""Checks requests against their bundle, and fills in all defaults."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import Message

from concertina.v1 import generation_service_pb2 as pb
from server.api.prompt import empty_prompt, prompt_tokens, scored_tokens
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.restore import BEGINNING, ResumeCursor
from server.errors import InvalidRequest
from server.request import (
    LONGEST_BAD_WORD,
    LONGEST_KEEP_S,
    LogitsProcessors,
    Request,
    SamplingParameters,
)

_MAX_STOPS = 16
_MAX_STOP_BYTES = 256
_MAX_WORDS = 128
_MAX_BIAS = 100
_MAX_PENALTY = 2
_MAX_OUTPUTS = 128
_MAX_KEY_BYTES = 128
_MAX_LAST_IDS = 4096
_MAX_COUNT = 1 << 40
_MAX_TOP_LOGPROBS = 20
_MAX_PRIORITY = 100
_MAX_SECONDS = 315_576_000_000  # what google.protobuf.Duration allows


def generate_request(
    bundle: Bundle, request: pb.GenerateRequest, config: EngineConfig
) -> tuple[Request, ...]:
    """The outputs of a `GenerateRequest`. They share one prompt.

    Raises InvalidRequest with field, value and limit.
    """
    if request.HasField("prompt"):
        prompt = prompt_tokens(bundle, request.prompt, room=1)
    else:
        prompt = empty_prompt(bundle)
    _check_keep(request)
    stopping, options = request.stopping, request.output
    left = bundle.context - len(prompt)
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else left
    if not 1 <= max_tokens <= left:
        raise InvalidRequest(
            f"stopping.max_tokens is {max_tokens}; it must be between 1 and {left}: {bundle.name} "
            f"has a context of {bundle.context} tokens and the prompt takes {len(prompt)}",
            field="stopping.max_tokens",
            limit=left if max_tokens > left else 1,
        )
    if stopping.min_tokens > max_tokens:
        raise InvalidRequest(
            f"stopping.min_tokens is {stopping.min_tokens}; it must be at most {max_tokens}, "
            "which is max_tokens",
            field="stopping.min_tokens",
            limit=max_tokens,
        )
    first = Request(
        prompt=prompt,
        sampling=_sampling(bundle, request),
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        stop=_stop_strings(bundle, stopping),
        stop_tokens=frozenset(_ids(bundle, "stopping.stop_token_ids", stopping.stop_token_ids)),
        include_stop=stopping.include_stop,
        end_tokens=frozenset() if stopping.ignore_eos else bundle.end_tokens,
        time_limit_s=_time_limit(stopping),
        complete_at=bundle.codec.complete_at,
        prompt_logprobs=_top_logprobs(options, "prompt_logprobs"),
        stream_interval=_count(options, "stream_interval", config.stream_buffer),
        priority=_priority(request),
    )
    outputs = _count(options, "n", min(_MAX_OUTPUTS, config.slots + config.queue_limit))
    return first, *(
        replace(first, sampling=replace(first.sampling, output=output), prompt_logprobs=None)
        for output in range(1, outputs)
    )


def resume_request(request: pb.ResumeRequest) -> tuple[ResumeCursor, ...]:
    """The resume cursors of a `ResumeRequest`, by output index.

    Raises InvalidRequest with field, value and limit.
    """
    _check_counts("", request, ("after_sequence",))
    cursors: dict[int, ResumeCursor] = {}
    for given in request.cursors:
        _check_counts("cursors.", given, ("tokens", "characters", "prompt_logprobs"))
        if given.output >= _MAX_OUTPUTS or given.output in cursors:
            raise InvalidRequest(
                f"cursors names output {given.output}; each may be named once, up to "
                f"{_MAX_OUTPUTS - 1}",
                field="cursors",
                limit=_MAX_OUTPUTS - 1,
            )
        if len(given.last_ids) > min(_MAX_LAST_IDS, given.tokens):
            raise InvalidRequest(
                f"cursors.last_ids has {len(given.last_ids)} ids; it may have "
                f"{min(_MAX_LAST_IDS, given.tokens)}",
                field="cursors.last_ids",
                limit=min(_MAX_LAST_IDS, given.tokens),
            )
        cursors[given.output] = ResumeCursor(
            given.tokens,
            given.characters,
            given.prompt_logprobs,
            given.ended,
            tuple(given.last_ids),
        )
    return tuple(cursors.get(output, BEGINNING) for output in range(max(cursors, default=-1) + 1))


def _out_of_range(field: str, value: float, lowest: float, highest: float) -> InvalidRequest:
    return InvalidRequest(
        f"{field} is {value}; it must be between {lowest} and {highest}",
        field=field,
        limit=highest if value > highest else lowest,
    )


def _check_counts(prefix: str, message: Message, names: Sequence[str]) -> None:
    for name in names:
        if (value := getattr(message, name)) > _MAX_COUNT:
            raise InvalidRequest(
                f"{prefix}{name} is {value}; it must be at most {_MAX_COUNT}",
                field=f"{prefix}{name}",
                limit=_MAX_COUNT,
            )


def score_request(bundle: Bundle, request: pb.ScoreRequest) -> Request:
    """The request of a `ScoreRequest`. Raises InvalidRequest with field, value and limit."""
    return Request(prompt=scored_tokens(bundle, request.prompt), score=True)


def _sampling(bundle: Bundle, request: pb.GenerateRequest) -> SamplingParameters:
    sampling = request.sampling
    defaults = SamplingParameters(seed=secrets.randbits(63))

    def given(name: str) -> float:
        value = getattr(sampling if sampling.HasField(name) else defaults, name)
        return float(value)

    temperature, top_p, min_p = given("temperature"), given("top_p"), given("min_p")
    typical_p = given("typical_p")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidRequest(
            f"sampling.temperature is {temperature}; it must be finite and >= 0",
            field="sampling.temperature",
            limit=0,
        )
    for name, value in (("top_p", top_p), ("typical_p", typical_p)):
        if not 0 < value <= 1:
            raise InvalidRequest(
                f"sampling.{name} is {value}; it must be above 0 and at most 1",
                field=f"sampling.{name}",
                limit=1 if value > 1 else 0,
            )
    if not 0 <= min_p <= 1:
        raise _out_of_range("sampling.min_p", min_p, 0, 1)
    processors = _processors(bundle, request)
    return SamplingParameters(
        temperature=temperature,
        top_k=sampling.top_k,
        top_p=top_p,
        min_p=min_p,
        seed=sampling.seed if sampling.HasField("seed") else defaults.seed,
        typical_p=typical_p,
        logprobs=_top_logprobs(request.output, "logprobs"),
        processors=None if processors == LogitsProcessors() else processors,
    )


def _processors(bundle: Bundle, request: pb.GenerateRequest) -> LogitsProcessors:
    sampling, stopping = request.sampling, request.stopping
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    if not (math.isfinite(repetition) and repetition > 0):
        raise InvalidRequest(
            f"sampling.repetition_penalty is {repetition}; it must be finite and above 0",
            field="sampling.repetition_penalty",
            limit=0,
        )
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    for name, value in (("frequency_penalty", frequency), ("presence_penalty", presence)):
        if not -_MAX_PENALTY <= value <= _MAX_PENALTY:
            raise _out_of_range(f"sampling.{name}", value, -_MAX_PENALTY, _MAX_PENALTY)
    ending = {*stopping.stop_token_ids}
    if not stopping.ignore_eos:
        ending |= bundle.end_tokens
    words = _bad_words(bundle, sampling)
    processors = LogitsProcessors(
        bias=_bias(bundle, sampling),
        allowed=_ids(bundle, "sampling.allowed_token_ids", sampling.allowed_token_ids),
        bad_words=words if bundle.codec.is_bytewise else (),
        bad_bytes=() if bundle.codec.is_bytewise else tuple(map(bytes, words)),
        min_tokens=stopping.min_tokens if ending else 0,
        withheld=tuple(sorted(ending)) if stopping.min_tokens else (),
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    forbidden = {*processors.withheld} | {w[0] for w in processors.bad_words if len(w) == 1}
    for word in processors.bad_bytes:
        forbidden.update(bundle.codec.text.containing(word).tolist())
    allowed = {*processors.allowed}
    if not (allowed - forbidden if allowed else len(forbidden) < bundle.vocabulary):
        raise InvalidRequest(
            f"sampling.allowed_token_ids has {len(processors.allowed)} ids, and "
            "sampling.bad_words or stopping.min_tokens forbid them all: at least 1 token must be "
            "left to draw",
            field="sampling.allowed_token_ids",
        )
    return processors


def _bias(bundle: Bundle, sampling: pb.SamplingParameters) -> tuple[tuple[int, float], ...]:
    for token, bias in sampling.logit_bias.items():
        if token >= bundle.vocabulary:
            raise InvalidRequest(
                f"sampling.logit_bias has id {token}; "
                f"ids of {bundle.name} must be below {bundle.vocabulary}",
                field="sampling.logit_bias",
                limit=bundle.vocabulary - 1,
            )
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise _out_of_range(f"sampling.logit_bias[{token}]", bias, -_MAX_BIAS, _MAX_BIAS)
    return tuple(sorted(sampling.logit_bias.items()))


def _bad_words(bundle: Bundle, sampling: pb.SamplingParameters) -> tuple[tuple[int, ...], ...]:
    if sampling.bad_words and not bundle.codec.writes_text:
        raise InvalidRequest(
            f"sampling.bad_words was given, but {bundle.name} makes {bundle.codec.makes}: "
            "give allowed_token_ids or logit_bias",
            field="sampling.bad_words",
        )
    _check_strings("sampling.bad_words", sampling.bad_words, _MAX_WORDS, LONGEST_BAD_WORD)
    return tuple(tuple(word.encode()) for word in sampling.bad_words)


def _stop_strings(bundle: Bundle, stopping: pb.StoppingCriteria) -> tuple[str, ...]:
    if stopping.stop and not bundle.codec.writes_text:
        raise InvalidRequest(
            f"stopping.stop was given, but {bundle.name} makes {bundle.codec.makes}",
            field="stopping.stop",
        )
    _check_strings("stopping.stop", stopping.stop, _MAX_STOPS, _MAX_STOP_BYTES)
    return tuple(stopping.stop)


def _check_strings(field: str, strings: Sequence[str], most: int, longest: int) -> None:
    if len(strings) > most:
        raise InvalidRequest(
            f"{field} has {len(strings)} strings, the limit is {most}", field=field, limit=most
        )
    for index, string in enumerate(strings):
        size = len(string.encode())
        if not 1 <= size <= longest:
            raise InvalidRequest(
                f"{field}[{index}] has {size} bytes; it must have 1 to {longest}",
                field=f"{field}[{index}]",
                limit=longest if size else 1,
            )


def _ids(bundle: Bundle, field: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The token ids, sorted and without duplicates."""
    for index, token in enumerate(ids):
        if token >= bundle.vocabulary:
            raise InvalidRequest(
                f"{field}[{index}] is {token}; "
                f"ids of {bundle.name} must be below {bundle.vocabulary}",
                field=f"{field}[{index}]",
                limit=bundle.vocabulary - 1,
            )
    return tuple(sorted(set(ids)))


def _count(options: pb.OutputOptions, name: str, most: int) -> int:
    """An output option of at least 1, which is also the default."""
    value: int = getattr(options, name) if options.HasField(name) else 1
    if not 1 <= value <= most:
        raise _out_of_range(f"output.{name}", value, 1, most)
    return value


def _top_logprobs(options: pb.OutputOptions, name: str) -> int | None:
    if not options.HasField(name):
        return None
    value: int = getattr(options, name)
    if value > _MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"output.{name} is {value}; it must be at most {_MAX_TOP_LOGPROBS}",
            field=f"output.{name}",
            limit=_MAX_TOP_LOGPROBS,
        )
    return value


def _priority(request: pb.GenerateRequest) -> int:
    if not -_MAX_PRIORITY <= request.priority <= _MAX_PRIORITY:
        raise _out_of_range("priority", request.priority, -_MAX_PRIORITY, _MAX_PRIORITY)
    return request.priority


def _time_limit(stopping: pb.StoppingCriteria) -> float | None:
    if not stopping.HasField("time_limit"):
        return None
    seconds = stopping.time_limit.seconds + stopping.time_limit.nanos / 1e9
    if not 0 < seconds <= _MAX_SECONDS:
        raise InvalidRequest(
            f"stopping.time_limit is {seconds} s; it must be above 0 and at most {_MAX_SECONDS}",
            field="stopping.time_limit",
            limit=_MAX_SECONDS if seconds > 0 else 0,
        )
    return seconds


def keep_s(request: pb.GenerateRequest) -> float:
    """Seconds that the stream is kept without a reader."""
    return float(request.keep.seconds + request.keep.nanos / 1e9)


def _check_keep(request: pb.GenerateRequest) -> None:
    keep = keep_s(request)
    if not 0 <= keep <= LONGEST_KEEP_S:
        raise _out_of_range("keep", keep, 0, LONGEST_KEEP_S)
    size = len(request.idempotency_key.encode())
    if size > _MAX_KEY_BYTES:
        raise InvalidRequest(
            f"idempotency_key has {size} bytes; the limit is {_MAX_KEY_BYTES}",
            field="idempotency_key",
            limit=_MAX_KEY_BYTES,
        )
    if size and not keep:
        raise InvalidRequest(
            "idempotency_key needs keep: without it there is nothing to attach to", field="keep"
        )
