"""Checks requests against their bundle, and fills in all defaults.

What can be checked without a bundle was checked before: see `server.api.limits`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import Message

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api.prompt import empty_prompt, prompt_tokens, scored_tokens
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.restore import BEGINNING, ResumeCursor
from server.errors import InvalidRequest
from server.request import (
    Grammar,
    LogitsProcessors,
    Request,
    SamplingParameters,
)

_QUICK_ITEMS = 4096


def takes_long(request: Message) -> bool:
    """Whether to check a request may take more than a millisecond, so not on an event loop."""
    if isinstance(request, pb.ResumeRequest):
        return sum(len(cursor.last_ids) for cursor in request.cursors) > _QUICK_ITEMS
    assert isinstance(request, pb.GenerateRequest | pb.ScoreRequest | session_pb.ContinueRequest)
    prompt = request.prompt
    if prompt.WhichOneof("content") in ("image", "messages"):
        return True
    items = len(prompt.tokens.ids) + len(prompt.text)
    if not isinstance(request, pb.ScoreRequest):
        items += len(request.sampling.allowed_token_ids)
    return items > _QUICK_ITEMS


def generate_request(
    bundle: Bundle, request: pb.GenerateRequest, config: EngineConfig
) -> tuple[Request, ...]:
    """The outputs of a `GenerateRequest` within its limits. They share one prompt.

    Raises InvalidRequest with field, value and limit.
    """
    if request.HasField("prompt"):
        prompt = prompt_tokens(bundle, request.prompt, room=1)
    else:
        prompt = empty_prompt(bundle)
    if request.idempotency_key and not keep_s(request):
        raise InvalidRequest(
            "idempotency_key needs keep: without it there is nothing to attach to", field="keep"
        )
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
        prompt_logprobs=options.prompt_logprobs if options.HasField("prompt_logprobs") else None,
        stream_interval=_count(options, "stream_interval", config.stream_buffer),
        priority=request.priority,
    )
    outputs = _count(options, "n", config.slots + config.queue_limit)
    return first, *(
        replace(first, sampling=replace(first.sampling, output=output), prompt_logprobs=None)
        for output in range(1, outputs)
    )


def resume_request(request: pb.ResumeRequest) -> tuple[ResumeCursor, ...]:
    """The resume cursors of a `ResumeRequest` within its limits, by output index.

    Raises InvalidRequest with field, value and limit.
    """
    cursors: dict[int, ResumeCursor] = {}
    for index, given in enumerate(request.cursors):
        if given.output in cursors:
            raise InvalidRequest(
                f"cursors[{index}].output is {given.output}, as in another cursor; each "
                "output may be named once",
                field=f"cursors[{index}].output",
            )
        if len(given.last_ids) > given.tokens:
            raise InvalidRequest(
                f"cursors[{index}].last_ids has {len(given.last_ids)} ids; it may have "
                f"{given.tokens}, which is tokens",
                field=f"cursors[{index}].last_ids",
                limit=given.tokens,
            )
        cursors[given.output] = ResumeCursor(
            given.tokens,
            given.characters,
            given.prompt_logprobs,
            given.ended,
            tuple(given.last_ids),
        )
    return tuple(cursors.get(output, BEGINNING) for output in range(max(cursors, default=-1) + 1))


def score_request(bundle: Bundle, request: pb.ScoreRequest) -> Request:
    """The request of a `ScoreRequest`. Raises InvalidRequest with field, value and limit."""
    return Request(prompt=scored_tokens(bundle, request.prompt), score=True)


def _sampling(bundle: Bundle, request: pb.GenerateRequest) -> SamplingParameters:
    sampling, output = request.sampling, request.output
    defaults = SamplingParameters(seed=secrets.randbits(63))

    def given(name: str) -> float:
        value = getattr(sampling if sampling.HasField(name) else defaults, name)
        return float(value)

    processors = _processors(bundle, request)
    return SamplingParameters(
        temperature=given("temperature"),
        top_k=sampling.top_k,
        top_p=given("top_p"),
        min_p=given("min_p"),
        seed=sampling.seed if sampling.HasField("seed") else defaults.seed,
        typical_p=given("typical_p"),
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        processors=None if processors == LogitsProcessors() else processors,
        grammar=_grammar(bundle, sampling) if sampling.HasField("grammar") else None,
    )


def _grammar(bundle: Bundle, sampling: pb.SamplingParameters) -> Grammar:
    asked = sampling.grammar
    kind = asked.WhichOneof("kind")
    if not bundle.codec.writes_text:
        raise InvalidRequest(
            f"sampling.grammar was given, but {bundle.name} makes {bundle.codec.makes}",
            field="sampling.grammar",
        )
    if kind is None:
        raise InvalidRequest(
            "sampling.grammar is empty: give json_schema, json_object, regex, choice or lark",
            field="sampling.grammar",
        )
    if kind == "json_object":
        return bundle.grammars.compiled(kind, ())
    texts = asked.choice.texts if kind == "choice" else (getattr(asked, kind),)
    return bundle.grammars.compiled(kind, texts)


def _processors(bundle: Bundle, request: pb.GenerateRequest) -> LogitsProcessors:
    sampling, stopping = request.sampling, request.stopping
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
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
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
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
    for token in sampling.logit_bias:
        if token >= bundle.vocabulary:
            raise InvalidRequest(
                f"sampling.logit_bias has id {token}; "
                f"ids of {bundle.name} must be below {bundle.vocabulary}",
                field="sampling.logit_bias",
                limit=bundle.vocabulary - 1,
            )
    return tuple(sorted(sampling.logit_bias.items()))


def _bad_words(bundle: Bundle, sampling: pb.SamplingParameters) -> tuple[tuple[int, ...], ...]:
    if sampling.bad_words and not bundle.codec.writes_text:
        raise InvalidRequest(
            f"sampling.bad_words was given, but {bundle.name} makes {bundle.codec.makes}: "
            "give allowed_token_ids or logit_bias",
            field="sampling.bad_words",
        )
    return tuple(tuple(word.encode()) for word in sampling.bad_words)


def _stop_strings(bundle: Bundle, stopping: pb.StoppingCriteria) -> tuple[str, ...]:
    if stopping.stop and not bundle.codec.writes_text:
        raise InvalidRequest(
            f"stopping.stop was given, but {bundle.name} makes {bundle.codec.makes}",
            field="stopping.stop",
        )
    return tuple(stopping.stop)


def _ids(bundle: Bundle, field: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The token ids, sorted and without duplicates."""
    if len(ids) > bundle.vocabulary:
        raise InvalidRequest(
            f"{field} has {len(ids)} ids; {bundle.name} has {bundle.vocabulary}: name each once",
            field=field,
            limit=bundle.vocabulary,
        )
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
    if value > most:
        raise InvalidRequest(
            f"output.{name} is {value}; it must be between 1 and {most} on this server",
            field=f"output.{name}",
            limit=most,
        )
    return value


def _time_limit(stopping: pb.StoppingCriteria) -> float | None:
    if not stopping.HasField("time_limit"):
        return None
    return float(stopping.time_limit.seconds + stopping.time_limit.nanos / 1e9)


def keep_s(request: pb.GenerateRequest) -> float:
    """Seconds that the stream is kept without a reader."""
    return float(request.keep.seconds + request.keep.nanos / 1e9)
