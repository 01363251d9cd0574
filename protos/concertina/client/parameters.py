"""What a caller may say of an output: how it is drawn, what it may be, when it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Final, TypedDict

from concertina.client.errors import InvalidRequest
from concertina.client.fields import MOST_REASON, duration, message
from concertina.shown import cut, shown
from concertina.v1 import generation_service_pb2 as pb

_GRAMMARS: Final = ("json_schema", "json_object", "regex", "choice", "lark")
# Keyword arguments of the calls that are no parameters of the request.
_OF_THE_CALL: Final = ("prompt", "timeout", "keep", "resume_for")


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


def sampling_message(parameters: ContinueParameters) -> pb.SamplingParameters:
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
        reason = cut(str(error), MOST_REASON)
        raise _no_grammar("json_schema", f"cannot be written as JSON: {reason}") from None


def _no_grammar(name: str, reason: str) -> InvalidRequest:
    field = f"sampling.grammar.{name}"
    return InvalidRequest(f"{field} {reason}", field=field)


def stopping_message(parameters: ContinueParameters) -> pb.StoppingCriteria:
    stop = parameters.get("stop")
    return message(
        pb.StoppingCriteria,
        max_tokens=parameters.get("max_tokens"),
        min_tokens=parameters.get("min_tokens"),
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=parameters.get("stop_token_ids"),
        include_stop=parameters.get("include_stop"),
        ignore_eos=parameters.get("ignore_eos"),
        time_limit=duration(pb.StoppingCriteria, "time_limit", parameters.get("time_limit")),
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
