"""Converts requests to their stored form in a snapshot and back."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from concertina.shown import shown
from concertina.v1 import snapshot_pb2 as pb
from server.bundles.bundle import Bundle
from server.bundles.grammars import GRAMMAR_KINDS
from server.errors import InvalidRequest, SnapshotRefused
from server.request import (
    LONGEST_BAD_WORD,
    LogitsProcessors,
    Prompt,
    Request,
    SamplingParameters,
)

_MOST_OUTPUTS = 128
_MOST_LOGPROBS = 20
_MOST_STOPS = 16
_LONGEST_STOP = 256
_LONGEST_S = 315_576_000_000  # what google.protobuf.Duration allows


def stored_request(requests: tuple[Request, ...]) -> pb.StoredRequest:
    """The stored form of a request, from its outputs."""
    first = requests[0]
    tokens = first.prompt.tokens
    return pb.StoredRequest(
        outputs=len(requests),
        start_token=first.prompt.start,
        prompt=tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes(),
        sampling=_stored_sampling(first.sampling),
        max_tokens=first.max_tokens,
        min_tokens=first.min_tokens,
        stop=first.stop,
        stop_tokens=sorted(first.stop_tokens),
        include_stop=first.include_stop,
        end_token=min(first.end_tokens, default=None),
        more_end_tokens=sorted(first.end_tokens)[1:],
        time_limit_seconds=first.time_limit_s,
        complete_at=first.complete_at,
        prompt_logprobs=first.prompt_logprobs,
        stream_interval=first.stream_interval,
        priority=first.priority,
    )


def requests_from(bundle: Bundle, stored: pb.StoredRequest) -> tuple[Request, ...]:
    """The outputs of a stored request. Raises SnapshotRefused if they do not fit the bundle."""
    width = np.dtype(bundle.typecode).itemsize
    if len(stored.prompt) % width:
        raise SnapshotRefused(
            f"the snapshot's prompt has {len(stored.prompt)} bytes, not a multiple of {width}"
        )
    try:
        sampling = _sampling(bundle, stored.sampling)
    except InvalidRequest as error:  # another release of the library may refuse what one took
        raise SnapshotRefused(f"the snapshot's grammar is not usable here: {error}") from None
    prompt = Prompt(
        stored.start_token,
        np.frombuffer(stored.prompt, f"<u{width}").astype(bundle.typecode, copy=False),
    )
    first = Request(
        prompt=prompt,
        sampling=sampling,
        max_tokens=stored.max_tokens,
        stop=tuple(stored.stop),
        stop_tokens=frozenset(stored.stop_tokens),
        include_stop=stored.include_stop,
        min_tokens=stored.min_tokens,
        end_tokens=frozenset(
            (*([stored.end_token] if stored.HasField("end_token") else []), *stored.more_end_tokens)
        ),
        time_limit_s=stored.time_limit_seconds if stored.HasField("time_limit_seconds") else None,
        complete_at=stored.complete_at if stored.HasField("complete_at") else None,
        prompt_logprobs=stored.prompt_logprobs if stored.HasField("prompt_logprobs") else None,
        stream_interval=stored.stream_interval,
        priority=stored.priority,
    )
    if not 1 <= stored.outputs <= _MOST_OUTPUTS:
        raise SnapshotRefused(
            f"the snapshot's request has {stored.outputs} outputs, not 1 to {_MOST_OUTPUTS}"
        )
    if misfit := _misfit(bundle, first):
        raise SnapshotRefused(f"the snapshot's request does not fit {bundle.name}: {misfit}")
    return first, *(
        replace(first, sampling=replace(first.sampling, output=output), prompt_logprobs=None)
        for output in range(1, stored.outputs)
    )


def _stored_sampling(sampling: SamplingParameters) -> pb.StoredSampling:
    stored = pb.StoredSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        typical_p=sampling.typical_p,
        logprobs=sampling.logprobs,
    )
    if (processors := sampling.processors) is not None:
        stored.processors.CopyFrom(
            pb.StoredProcessors(
                bias=dict(processors.bias),
                allowed=processors.allowed,
                bad_words=[pb.StoredWord(tokens=word) for word in processors.bad_words],
                bad_bytes=processors.bad_bytes,
                min_tokens=processors.min_tokens,
                withheld=processors.withheld,
                repetition_penalty=processors.repetition_penalty,
                frequency_penalty=processors.frequency_penalty,
                presence_penalty=processors.presence_penalty,
            )
        )
    if (grammar := sampling.grammar) is not None:
        stored.grammar.CopyFrom(pb.StoredGrammar(kind=grammar.kind, texts=grammar.texts))
    return stored


def _sampling(bundle: Bundle, stored: pb.StoredSampling) -> SamplingParameters:
    """The sampling parameters. Raises InvalidRequest for a grammar that cannot be compiled."""
    processors, grammar = None, None
    if stored.HasField("grammar"):
        if stored.grammar.kind not in GRAMMAR_KINDS or not bundle.codec.writes_text:
            raise InvalidRequest(f"its kind is {shown(stored.grammar.kind)}")
        grammar = bundle.grammars.compiled(stored.grammar.kind, stored.grammar.texts)
    if stored.HasField("processors"):
        processors = LogitsProcessors(
            bias=tuple(sorted(stored.processors.bias.items())),
            allowed=tuple(stored.processors.allowed),
            bad_words=tuple(tuple(word.tokens) for word in stored.processors.bad_words),
            bad_bytes=tuple(stored.processors.bad_bytes),
            min_tokens=stored.processors.min_tokens,
            withheld=tuple(stored.processors.withheld),
            repetition_penalty=stored.processors.repetition_penalty,
            frequency_penalty=stored.processors.frequency_penalty,
            presence_penalty=stored.processors.presence_penalty,
        )
    return SamplingParameters(
        temperature=stored.temperature,
        top_k=stored.top_k,
        top_p=stored.top_p,
        min_p=stored.min_p,
        seed=stored.seed,
        typical_p=stored.typical_p,
        logprobs=stored.logprobs if stored.HasField("logprobs") else None,
        processors=processors,
        grammar=grammar,
    )


def _misfit(bundle: Bundle, request: Request) -> str:
    """The parts of a request that do not fit the bundle, as text; empty if all fit."""
    prompt, sampling = request.prompt, request.sampling
    processors = sampling.processors or LogitsProcessors()
    words = processors.bad_words
    ids = {*request.stop_tokens, *processors.allowed, *processors.withheld}
    ids |= {token for token, _ in processors.bias} | {token for word in words for token in word}
    ids |= {*request.end_tokens, int(prompt.tokens.max(initial=0))}
    numbers = (
        *(bias for _, bias in processors.bias),
        processors.frequency_penalty,
        processors.presence_penalty,
    )
    checks = {
        "start token": bundle.codec.starts.allows(prompt.start),
        "token ids": max(ids) < bundle.vocabulary,
        "max_tokens": 1 <= request.max_tokens <= bundle.context - len(prompt),
        "min_tokens": max(request.min_tokens, processors.min_tokens) <= request.max_tokens,
        "complete_at": request.complete_at == bundle.codec.complete_at,
        "stop strings": len(request.stop) <= _MOST_STOPS
        and all(1 <= len(text.encode()) <= _LONGEST_STOP for text in request.stop),
        "bad words": all(
            1 <= len(word) <= LONGEST_BAD_WORD for word in (*words, *processors.bad_bytes)
        ),
        "logprobs": max(sampling.logprobs or 0, request.prompt_logprobs or 0) <= _MOST_LOGPROBS,
        "stream_interval": 1 <= request.stream_interval <= bundle.context,
        "temperature": 0 <= sampling.temperature < math.inf,
        "top_p or typical_p": all(0 < p <= 1 for p in (sampling.top_p, sampling.typical_p)),
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": 0 < processors.repetition_penalty < math.inf,
        "time_limit": request.time_limit_s is None or 0 < request.time_limit_s <= _LONGEST_S,
        "a bias or a penalty": all(map(math.isfinite, numbers)),
    }
    return ", ".join(name for name, fits in checks.items() if not fits)
