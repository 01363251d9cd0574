"""Converts what the server holds to messages of the API."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from google.protobuf.duration_pb2 import Duration

from concertina.codecs.codec import Codec
from concertina.v1 import generation_service_pb2 as pb
from server.arrays import Ints
from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason, TokenLogprobs
from server.engine.updates import HandedOver, Scored
from server.errors import RequestError
from server.request import Grammar, Lease, LogitsProcessors, Prompt, Request
from server.sessions.subscriber import Delta, Event, PromptLogprobs

_REASONS = {
    FinishReason.END: pb.FINISH_REASON_END,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    FinishReason.PAUSED: pb.FINISH_REASON_PAUSED,
}


def accepted_message(bundle: Bundle, lease: Lease, durable: bool) -> pb.Accepted:
    """The `Accepted` message of a lease, with all defaults filled in."""
    request = lease.requests[0]
    return pb.Accepted(
        keep=duration(lease.keep_s) if lease.keep_s else None,
        durable=durable,
        stream_id=lease.stream_id,
        model=bundle.name,
        fingerprint=bundle.fingerprint,
        sampling=_sampling_message(request),
        stopping=_stopping_message(bundle, request),
        prompt_tokens=len(request.prompt),
        output=_output_message(lease),
        priority=request.priority,
    )


def request_message(bundle: Bundle, lease: Lease) -> pb.GenerateRequest:
    """The request of a lease, so that `Continue` can change parts of it.

    Leaves `max_tokens` out if it fills the context.
    """
    request = lease.requests[0]
    message = pb.GenerateRequest(
        sampling=_sampling_message(request),
        stopping=_stopping_message(bundle, request),
        output=_output_message(lease),
        priority=request.priority,
    )
    if request.last_position == bundle.context:
        message.stopping.ClearField("max_tokens")
    if len(ids := prompt_ids(bundle, request.prompt)):
        message.prompt.tokens.ids.extend(ids.tolist())
    if (label := bundle.codec.starts.label_of(request.prompt.start)) is not None:
        message.prompt.label = label
    return message


def prompt_ids(bundle: Bundle, prompt: Prompt) -> Ints:
    """The ids with which a request asks for this prompt."""
    return bundle.codec.starts.joined(prompt.start, prompt.tokens.astype(np.int64))


def text_bytes(bundle: Bundle, prompt: Prompt) -> int | None:
    """Bytes of the text of a prompt without its start token; None if it is no text."""
    codec = bundle.codec
    if not codec.writes_text:
        return None
    is_beginning = codec.text.is_beginning((prompt.start,))
    return len(codec.text.bytes_of(prompt.tokens.tolist(), is_beginning))


def _sampling_message(request: Request) -> pb.SamplingParameters:
    sampling = request.sampling
    processors = sampling.processors or LogitsProcessors()
    return pb.SamplingParameters(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        typical_p=sampling.typical_p,
        repetition_penalty=processors.repetition_penalty,
        presence_penalty=processors.presence_penalty,
        frequency_penalty=processors.frequency_penalty,
        logit_bias=dict(processors.bias),
        allowed_token_ids=processors.allowed,
        bad_words=[bytes(word).decode() for word in (*processors.bad_words, *processors.bad_bytes)],
        grammar=None if sampling.grammar is None else _grammar_message(sampling.grammar),
    )


def _grammar_message(grammar: Grammar) -> pb.Grammar:
    message = pb.Grammar()
    if grammar.kind == "json_object":
        message.json_object.SetInParent()
    elif grammar.kind == "choice":
        message.choice.texts.extend(grammar.texts)
    else:
        setattr(message, grammar.kind, *grammar.texts)
    return message


def _stopping_message(bundle: Bundle, request: Request) -> pb.StoppingCriteria:
    stopping = pb.StoppingCriteria(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        include_stop=request.include_stop,
        stop=request.stop,
        stop_token_ids=sorted(request.stop_tokens),
        ignore_eos=bool(bundle.end_tokens) and not request.end_tokens,
    )
    if request.time_limit_s is not None:
        stopping.time_limit.CopyFrom(duration(request.time_limit_s))
    return stopping


def _output_message(lease: Lease) -> pb.OutputOptions:
    request = lease.requests[0]
    return pb.OutputOptions(
        n=len(lease.requests),
        logprobs=request.sampling.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        stream_interval=request.stream_interval,
    )


def response_message(
    bundle: Bundle, request: Request, event: Event, sequence: int
) -> pb.GenerateResponse:
    """The response message of one event."""
    response = pb.GenerateResponse(sequence=sequence, output=request.sampling.output)
    match event:
        case Delta(first_position=position, tokens=tokens, text=text):
            rgb = bundle.codec.rgb(tokens)
            logprobs = _logprobs_messages(bundle.codec, tokens, event.logprobs)
            response.tokens.CopyFrom(
                pb.Tokens(
                    first_position=position, ids=tokens, text=text, rgb=rgb, logprobs=logprobs
                )
            )
        case PromptLogprobs(first_position=position):
            told = request.prompt.tokens[position : position + len(event.logprobs)].tolist()
            logprobs = _logprobs_messages(bundle.codec, told, event.logprobs)
            response.prompt_logprobs.CopyFrom(
                pb.PromptLogprobs(first_position=position, logprobs=logprobs)
            )
        case Finish():
            response.finished.CopyFrom(_finished_message(event, len(request.prompt)))
        case HandedOver():
            response.handed_over.SetInParent()
        case RequestError():
            response.error.CopyFrom(error_message(event))
        case Scored():
            raise AssertionError("a generated stream is never scored")
    return response


def _logprobs_messages(
    codec: Codec, tokens: Iterable[int], logprobs: Iterable[TokenLogprobs]
) -> list[pb.TokenLogprobs]:
    """One message for each of `logprobs`, with the strings of `tokens` if they are text."""
    messages = [
        pb.TokenLogprobs(logprob=p.logprob, top_ids=p.top_ids, top_logprobs=p.top_logprobs)
        for p in logprobs
    ]
    if codec.writes_text:
        text = codec.text
        for token, message in zip(tokens, messages, strict=False):  # no messages: none are wanted
            message.token, message.piece = text.written(token), text.pieces[token]
            message.top_tokens.extend([text.written(other) for other in message.top_ids])
            message.top_pieces.extend([text.pieces[other] for other in message.top_ids])
    return messages


def error_message(error: RequestError) -> pb.Error:
    """The `Error` message of an error."""
    message = pb.Error(
        code=error.status,
        message=error.message,
        retryable=error.retryable,
        field=error.field,
        limit=error.limit,
    )
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(duration(error.retry_after_s))
    return message


def duration(seconds: float) -> Duration:
    """Seconds as a protobuf Duration."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _finished_message(finish: Finish, prompt_tokens: int) -> pb.Finished:
    """The `Finished` message of an output."""
    usage = pb.Usage(
        prompt_tokens=prompt_tokens,
        generated_tokens=finish.generated,
        queue_time=duration(finish.queue_s),
        time_to_first_token=duration(finish.first_token_s),
        total_time=duration(finish.total_s),
        state_bytes=finish.state_bytes,
    )
    return pb.Finished(reason=_REASONS[finish.reason], stop=finish.stop, usage=usage)
