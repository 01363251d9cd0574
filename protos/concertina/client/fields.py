"""Makes messages from plain Python values; an error names the field that cannot hold its value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from concertina.bounds import bounds
from concertina.client.errors import InvalidRequest
from concertina.client.times import finite_seconds
from concertina.shown import cut, shown
from concertina.v1 import generation_service_pb2 as pb

_Message = TypeVar("_Message", bound=Message)
MOST_REASON: Final = 200
"""Most characters of a reason that another library gives."""
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
    reason = cut(str(error), MOST_REASON)
    return InvalidRequest(f"{field} is not valid: {shown(value)} ({reason})", field=field)


def duration(kind: type[Message], name: str, time: float | None) -> Duration | None:
    """Seconds for a field; None for None. Raises InvalidRequest, naming the field."""
    if time is None:
        return None
    made, most = Duration(), bounds(kind, name).highest
    seconds = finite_seconds(f"{_PLACES.get(kind, '')}{name}", time, most)
    made.FromNanoseconds(round(1e9 * seconds))
    return made
