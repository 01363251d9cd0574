"""What an output must be: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_…`.

Whatever asks for a structure and is not understood is refused: who reads the output as JSON must
not learn only then that nobody took care of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from concertina.client import GenerateParameters, InvalidRequest
from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.reading.fields import Body, boolean, table, text

_OURS: Final = re.compile(r"^sampling\.grammar(\.\w+(\.texts)?)?")
_FORMATS: Final = ("text", "json_object", "json_schema")
_SCHEMA_FIELDS: Final = frozenset({"name", "description", "schema", "strict"})
_KINDS: Final = ("json", "json_object", "regex", "choice", "grammar")
_GUIDED: Final = tuple(f"guided_{kind}" for kind in _KINDS)
# What vLLM takes beside the kind, and the value that changes nothing.
_OPTIONS: Final[Mapping[str, Any]] = {
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
}


@dataclass(frozen=True)
class Structure:
    """What an output must be.

    field: where the body says it, such as `structured_outputs.json`.
    parameters: the same for our client.
    """

    field: str
    parameters: GenerateParameters

    @property
    def param(self) -> str:
        """The field of the body."""
        return self.field.partition(".")[0]


def structure(body: Body) -> Structure | None:
    """What the output must be; None for any text. Raises HttpError."""
    guided = (_guided(body, name) for name in _GUIDED)
    asked = [each for each in (_response_format(body), _structured(body), *guided) if each]
    if len(asked) > 1:
        first, second, *_ = (each.field for each in asked)
        raise invalid(
            asked[1].param, f"{second} is given beside {first}: an output can be one of them only"
        )
    return asked[0] if asked else None


def refuse_structure(body: Body) -> None:
    """Raise HttpError if anything but `response_format` asks for a structure."""
    for name in ("structured_outputs", *_GUIDED):
        if body.get(name) not in (None, False):
            raise invalid(name, f"{name} is given: only text has a structure; leave it out")


@contextmanager
def in_words_of(asked: Structure | None) -> Iterator[None]:
    """What the server says of a structure is said of the field that asked for it."""
    try:
        yield
    except InvalidRequest as error:
        if asked is None or not error.field.startswith("sampling.grammar"):
            raise
        raise invalid(asked.param, _OURS.sub(asked.field, str(error))) from None


def _response_format(body: Body) -> Structure | None:
    given = table(body, "response_format")
    if given is None:
        return None
    kind = given.get("type")
    if kind not in _FORMATS:
        raise _refused("response_format.type", kind, f"must be one of {', '.join(_FORMATS)}")
    _require_known(given, {"type", "json_schema"} if kind == "json_schema" else {"type"}, "")
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("response_format", {"json_object": True})
    described = given.get("json_schema")
    if not isinstance(described, dict):
        raise _refused("response_format.json_schema", described, "must be an object with `schema`")
    _require_known(described, _SCHEMA_FIELDS, ".json_schema")
    _check(described, "response_format.json_schema")
    schema = described.get("schema")
    if not isinstance(schema, dict):
        raise _refused("response_format.json_schema.schema", schema, "must be a JSON Schema")
    return Structure("response_format.json_schema.schema", {"json_schema": schema})


def _check(described: Body, place: str) -> None:
    """Raise HttpError for a name or a `strict` that is none. A schema is enforced without, too."""
    try:
        text(described, "name")
        text(described, "description")
        boolean(described, "strict")
    except HttpError as error:
        raise invalid("response_format", f"{place}.{error}") from None


def _require_known(given: Body, known: Set[str], place: str) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            raise _refused(
                f"response_format{place}.{name}", value, "is not understood there; leave it out"
            )


def _structured(body: Body) -> Structure | None:
    given = table(body, "structured_outputs")
    if given is None:
        return None
    for name, value in given.items():
        place = f"structured_outputs.{name}"
        if name in _OPTIONS and value not in (None, _OPTIONS[name]):
            raise _refused(place, value, "is not offered; leave it out")
        if name not in _OPTIONS and name not in _KINDS:
            raise _refused(place, value, f"must be one of {', '.join(_KINDS)}")
    asked = [kind for kind in _KINDS if _asks(kind, given.get(kind))]
    if len(asked) != 1:
        named = " and ".join(asked) or "none"
        raise invalid(
            "structured_outputs",
            f"structured_outputs has {named} of {', '.join(_KINDS)}: give one",
        )
    return _of_kind(asked[0], given[asked[0]], f"structured_outputs.{asked[0]}")


def _guided(body: Body, name: str) -> Structure | None:
    value = body.get(name)
    kind = name.removeprefix("guided_")
    return _of_kind(kind, value, name) if _asks(kind, value) else None


def _asks(kind: str, value: Any) -> bool:
    return value is not None and not (kind == "json_object" and value is False)


def _of_kind(kind: str, value: Any, field: str) -> Structure:
    match kind, value:
        case "json", str() | dict():
            return Structure(field, {"json_schema": value})
        case "json_object", True:
            return Structure(field, {"json_object": True})
        case "regex", str():
            return Structure(field, {"regex": value})
        case "grammar", str():
            return Structure(field, {"lark": value})
        case "choice", list() if all(isinstance(each, str) for each in value):
            return Structure(field, {"choice": value})
    raise _refused(field, value, f"must be {_MUST_BE[kind]}")


_MUST_BE: Final[Mapping[str, str]] = {
    "json": "a JSON Schema",
    "json_object": "true or false",
    "regex": "a regular expression",
    "choice": "a list of texts",
    "grammar": "a grammar in Lark",
}


def _refused(field: str, value: Any, reason: str) -> HttpError:
    return invalid(field.partition(".")[0], f"{field} is {shown(value)}: it {reason}")
