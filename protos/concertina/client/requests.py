"""Makes requests from plain Python values."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Final, TypeAlias, TypedDict, TypeGuard, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from concertina.bounds import bounds
from concertina.client.errors import InvalidRequest
from concertina.client.events import Cursor
from concertina.client.pictures import (
    PNG,
    PillowImage,
    PixelArray,
    check_raw,
    png_of_array,
    png_of_image,
)
from concertina.client.times import finite_seconds
from concertina.shown import cut, shown
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import session_service_pb2 as session_pb

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: the `role` and the `content` of each message."""

PromptLike: TypeAlias = (
    str | bytes | bytearray | memoryview | Sequence[int] | Messages | PillowImage | PixelArray
)
"""Text; a PNG, or three bytes per pixel in raster order; token ids; messages; a Pillow image; a
NumPy array.

An array of one axis is token ids; one of uint8, `[height, width]` or `[height, width, channels]`,
is a picture.
"""

_Message = TypeVar("_Message", bound=Message)
_KEY_BYTES = 16
_MOST_REASON: Final = 200
_GRAMMARS: Final = ("json_schema", "json_object", "regex", "choice", "lark")
# Keyword arguments of the calls that are no parameters of the request.
_OF_THE_CALL: Final = ("prompt", "timeout", "keep", "resume_for")
# Where in a request a message is, as the server's errors say it, too.
_PLACES: Final[dict[type[Message], str]] = {
    pb.Prompt: "prompt.",
    pb.TokenIds: "prompt.tokens.",
    pb.SamplingParameters: "sampling.",
    pb.Grammar: "sampling.grammar.",
    pb.Choice: "sampling.grammar.choice.",
    pb.StoppingCriteria: "stopping.",
    pb.OutputOptions: "output.",
}


class ContinueParameters(TypedDict, total=False):
    """Keyword arguments of `sessions.continue_`. For what is absent or None, the server chooses.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep this many of the likeliest tokens; 0 keeps all.
    top_p: keep the fewest likeliest tokens whose probabilities reach this sum, in (0, 1].
    min_p: keep tokens at least this probable relative to the likeliest, in [0, 1].
    typical_p: keep the tokens of the most typical surprise that reach this sum, in (0, 1].
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
        the output; above 0.
    presence_penalty: subtracted from the logits of tokens in the output, in [-2, 2].
    frequency_penalty: subtracted once per occurrence, in [-2, 2].
    logit_bias: added to the logits of token ids, each in [-100, 100].
    allowed_token_ids: only these ids are drawn; at least one.
    bad_words: strings, or one, that the output never contains.
    json_schema: the output is JSON that this schema describes, a mapping or its JSON.
    json_object: the output is a JSON object.
    regex: the output is text that this expression matches as a whole.
    choice: the output is one of these strings.
    lark: the output is text that this grammar describes, in llguidance's variant of Lark.
    seed: of the random numbers; `Accepted` holds the seed in use.
    max_tokens: most tokens to generate.
    min_tokens: before this many tokens only `max_tokens` or `time_limit` ends the stream.
    stop: the stream ends before the first of these strings.
    stop_token_ids: the stream ends before the first of these ids.
    include_stop: send the stop string or stop id that ended the stream too.
    ignore_eos: go on past the model's end token.
    time_limit: seconds after which the stream ends early, without an error.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    json_schema: str | Mapping[str, object] | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    lark: str | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    time_limit: float | None


class GenerateParameters(ContinueParameters, total=False):
    """Keyword arguments of `generate`: those of ContinueParameters, and these.

    model: name of the model; empty for the only one served.
    label: one of the model's labels; None for unconditional.
    n: outputs to generate side by side; each event names its output.
    logprobs: send the log-probability of each token and of this many of the likeliest, or 0.
    prompt_logprobs: the same for the tokens of the prompt.
    stream_interval: fewest tokens in an event, except for the first and the last.
    priority: streams with a higher priority go first, in [-100, 100].
    """

    model: str
    label: str | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    stream_interval: int | None
    priority: int | None


def generate_request(
    prompt: PromptLike | None, parameters: GenerateParameters, keep: float = 0.0
) -> pb.GenerateRequest:
    """A request to generate. With `keep` (seconds) it has a key, so that it is safe to send twice.

    Raises InvalidRequest, naming the parameter, for a value that the message cannot hold, and
    TypeError for a parameter that there is not.
    """
    check_parameters("generate", parameters)
    return message(
        pb.GenerateRequest,
        model=parameters.get("model"),
        prompt=prompt_message(prompt, parameters.get("label")),
        sampling=_sampling(parameters),
        stopping=_stopping(parameters),
        output=message(
            pb.OutputOptions,
            n=parameters.get("n"),
            logprobs=parameters.get("logprobs"),
            prompt_logprobs=parameters.get("prompt_logprobs"),
            stream_interval=parameters.get("stream_interval"),
        ),
        priority=parameters.get("priority"),
        keep=_duration(pb.GenerateRequest, "keep", keep) if keep else None,
        idempotency_key=secrets.token_urlsafe(_KEY_BYTES) if keep else None,
    )


def continue_request(
    stream_id: str, prompt: PromptLike | None, parameters: ContinueParameters
) -> session_pb.ContinueRequest:
    """A request to continue a stream.

    Raises InvalidRequest, naming the parameter, for a value that the message cannot hold, and
    TypeError for a parameter that there is not.
    """
    check_parameters("continue_", parameters, ContinueParameters.__optional_keys__)
    sampling, stopping = _sampling(parameters), _stopping(parameters)
    return message(
        session_pb.ContinueRequest,
        stream_id=stream_id,
        prompt=prompt_message(prompt, None),
        sampling=sampling if sampling.ListFields() else None,
        stopping=stopping if stopping.ListFields() else None,
    )


def fork_request(stream_id: str, n: int) -> session_pb.ForkRequest:
    """A request for copies. Raises InvalidRequest for a number that the message cannot hold."""
    return message(session_pb.ForkRequest, stream_id=stream_id, n=n)


def resume_request(stream_id: str, received: Iterable[Cursor]) -> pb.ResumeRequest:
    """A request for the rest of a stream. Raises InvalidRequest for a cursor that is none."""
    cursors = [
        message(
            pb.ResumeCursor,
            output=each.output,
            tokens=each.tokens,
            characters=each.characters,
            ended=each.ended,
            prompt_logprobs=each.prompt_logprobs,
        )
        for each in received
    ]
    return message(pb.ResumeRequest, stream_id=stream_id, cursors=cursors)


def score_request(prompt: PromptLike, model: str, label: str | None) -> pb.ScoreRequest:
    """A request for a score. Raises InvalidRequest for a prompt that the message cannot hold."""
    return message(pb.ScoreRequest, model=model, prompt=prompt_message(prompt, label))


def tokenize_request(prompt: PromptLike, model: str) -> model_pb.TokenizeRequest:
    """A request for tokens. Raises InvalidRequest for a prompt that the message cannot hold."""
    return message(model_pb.TokenizeRequest, model=model, prompt=prompt_message(prompt, None))


def prompt_message(prompt: PromptLike | None, label: str | None) -> pb.Prompt | None:
    """The message for a prompt; None for no prompt and no label: an unconditional start."""
    if prompt is None:
        return None if label is None else message(pb.Prompt, label=label)
    if isinstance(prompt, str):
        return message(pb.Prompt, text=prompt, label=label)
    if isinstance(prompt, bytes | bytearray) or _is_bytes(prompt):
        prompt = bytes(prompt)
        if prompt.startswith(PNG):
            return message(pb.Prompt, image=pb.ImageRows(png=prompt), label=label)
        check_raw(prompt)
        return message(pb.Prompt, image=pb.ImageRows(rgb=prompt), label=label)
    if len(getattr(prompt, "shape", ())) > 1:
        rows = pb.ImageRows(png=png_of_array(prompt))  # type: ignore[arg-type]  # an array, by its shape
        return message(pb.Prompt, image=rows, label=label)
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        messages = [message(pb.Message, **each) for each in prompt]  # type: ignore[arg-type]
        return message(pb.Prompt, messages=pb.Messages(messages=messages), label=label)
    if isinstance(prompt, Iterable):
        return message(pb.Prompt, tokens=message(pb.TokenIds, ids=prompt), label=label)
    if isinstance(prompt, PillowImage):
        return message(pb.Prompt, image=pb.ImageRows(png=png_of_image(prompt)), label=label)
    raise InvalidRequest(
        f"a prompt is text, token ids, PNG or RGB bytes, a Pillow image or a NumPy array; "
        f"got {type(prompt).__name__}",
        field="prompt",
    )


def _is_bytes(prompt: object) -> TypeGuard[memoryview]:
    return isinstance(prompt, memoryview) and prompt.ndim == 1 and prompt.itemsize == 1


def _sampling(parameters: ContinueParameters) -> pb.SamplingParameters:
    bad_words, allowed = parameters.get("bad_words"), parameters.get("allowed_token_ids")
    if isinstance(allowed, Sized) and not len(allowed):
        # On the wire, an empty list is one that was left out, so that it would allow every id.
        raise InvalidRequest(
            "sampling.allowed_token_ids is empty: it must hold at least 1 id; None allows all",
            field="sampling.allowed_token_ids",
            limit=1,
        )
    return message(
        pb.SamplingParameters,
        temperature=parameters.get("temperature"),
        top_k=parameters.get("top_k"),
        top_p=parameters.get("top_p"),
        min_p=parameters.get("min_p"),
        typical_p=parameters.get("typical_p"),
        repetition_penalty=parameters.get("repetition_penalty"),
        presence_penalty=parameters.get("presence_penalty"),
        frequency_penalty=parameters.get("frequency_penalty"),
        logit_bias=parameters.get("logit_bias"),
        allowed_token_ids=allowed,
        bad_words=[bad_words] if isinstance(bad_words, str) else bad_words,
        seed=parameters.get("seed"),
        grammar=_grammar(parameters),
    )


def _grammar(parameters: ContinueParameters) -> pb.Grammar | None:
    given = {name: parameters.get(name) for name in _GRAMMARS}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequest(
            f"sampling.grammar is {first} and {second}: an output can only be one of them",
            field="sampling.grammar",
        )
    for name, value in given.items():
        if name == "json_object":
            return pb.Grammar(json_object=pb.JsonObject())
        if name == "json_schema" and isinstance(value, Mapping):
            value = _schema_text(value)
        if name == "choice" and isinstance(value, str):
            raise _no_grammar(name, "must be a list of strings")
        if not value and isinstance(value, Sized):
            # On the wire, what is empty is left out, so that it would allow anything.
            raise _no_grammar(name, "is empty: it must hold at least 1; None allows all")
        if name == "choice":
            value = message(pb.Choice, texts=value)
        return message(pb.Grammar, **{name: value})
    return None


def _schema_text(schema: Mapping[str, object]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = cut(str(error), _MOST_REASON)
        raise _no_grammar("json_schema", f"cannot be written as JSON: {reason}") from None


def _no_grammar(name: str, reason: str) -> InvalidRequest:
    field = f"sampling.grammar.{name}"
    return InvalidRequest(f"{field} {reason}", field=field)


def _stopping(parameters: ContinueParameters) -> pb.StoppingCriteria:
    stop = parameters.get("stop")
    return message(
        pb.StoppingCriteria,
        max_tokens=parameters.get("max_tokens"),
        min_tokens=parameters.get("min_tokens"),
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=parameters.get("stop_token_ids"),
        include_stop=parameters.get("include_stop"),
        ignore_eos=parameters.get("ignore_eos"),
        time_limit=_duration(pb.StoppingCriteria, "time_limit", parameters.get("time_limit")),
    )


def check_parameters(
    call: str,
    given: Iterable[str],
    known: Iterable[str] = GenerateParameters.__optional_keys__,
) -> None:
    """Raises TypeError for the first name that is not known, as Python does for its functions."""
    known = {*known}
    for name in given:
        if name not in known:
            like = get_close_matches(name, {*known, *_OF_THE_CALL}, 1)
            hint = f"; did you mean {like[0]!r}?" if like else ""
            raise TypeError(f"{call}() got an unexpected keyword argument {shown(name)}{hint}")


def message(kind: type[_Message], **fields: object) -> _Message:
    """A message with the fields that are not None, set one by one so that an error names one.

    Raises InvalidRequest.
    """
    made = kind()
    for name, value in fields.items():
        if value is None:
            continue
        try:
            made.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise _fault(kind, name, value, error) from None
    return made


def _culprit(kind: type[Message], name: str, value: object) -> tuple[str, object]:
    """The item of a list or map that the field cannot hold, by its name; the whole if none is."""
    items: Iterable[tuple[object, object, object]] = ()
    if isinstance(value, Mapping):
        items = ((key, each, {key: each}) for key, each in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = ((index, each, [each]) for index, each in enumerate(value))
    for key, each, alone in items:
        try:
            kind(**{name: alone})
        except (TypeError, ValueError):
            return f"{name}[{shown(key)}]", each
    return name, value


def _fault(kind: type[Message], name: str, value: object, error: Exception) -> InvalidRequest:
    """The error for a value that a field cannot hold. error: why it cannot, in Python's words."""
    item, value = _culprit(kind, name, value)
    field = f"{_PLACES.get(kind, '')}{item}"
    if isinstance(value, int):
        allowed = bounds(kind, name)
        limit = allowed.broken_by(value)
        if limit is not None:
            what = f"{shown(value)}; it must be between {allowed.lowest} and {allowed.highest}"
            return InvalidRequest(f"{field} is {what}", field=field, limit=limit)
    reason = cut(str(error), _MOST_REASON)
    return InvalidRequest(f"{field} is not valid: {shown(value)} ({reason})", field=field)


def _duration(kind: type[Message], name: str, time: float | None) -> Duration | None:
    if time is None:
        return None
    duration, most = Duration(), bounds(kind, name).highest
    seconds = finite_seconds(f"{_PLACES.get(kind, '')}{name}", time, most)
    duration.FromNanoseconds(round(1e9 * seconds))
    return duration
