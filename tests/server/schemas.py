"""Forty JSON Schemas of the kinds that programs ask for: small records, lists, choices, references.

What they describe is short, so that a model that writes at random comes to an end.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
_SHORT = {"type": "string", "maxLength": 6}


def _record(required: list[str] | None = None, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties] if required is None else required,
        "additionalProperties": False,
    }


def _list(items: Schema, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS: dict[str, Schema] = {
    "anything": {},
    "numbers of any size": _list({"type": "number"}, 1),
    "a boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "an integer": {"type": "integer", "minimum": -50, "maximum": 5000},
    "above a bound": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 1000},
    "a number": {"type": "number", "minimum": 0, "maximum": 1},
    "a multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    "a short string": _SHORT,
    "a string of some length": {"type": "string", "minLength": 3, "maxLength": 5},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "part of a pattern": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 12},
    "a date": {"type": "string", "format": "date"},
    "a moment": {"type": "string", "format": "date-time"},
    "an address": {"type": "string", "format": "ipv4"},
    "a name for all": {"type": "string", "format": "uuid"},
    "one of some": {"enum": ["red", "green", "blue", 7, None, {"a": [1]}]},
    "a constant": {"const": {"kind": "none", "values": [1, 2.5, '\u00e4\n"']}},
    "two types": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    "an empty record": _record(),
    "a record": _record(name=_WORD, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "a record with options": _record(["id"], id=_WORD, note=_SHORT, done={"type": "boolean"}),
    "a record of options": _record([], a={"type": "null"}, b={"type": "boolean"}),
    "more properties": {
        "type": "object",
        "properties": {"id": {"type": "boolean"}},
        "required": ["id"],
        "additionalProperties": {"type": "null"},
    },
    "properties of a pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "a map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "a nested record": _record(user=_record(name=_WORD, tags=_list(_WORD)), active={"const": True}),
    "a list": _list({"type": "boolean"}),
    "a list of some length": _list({"enum": ["a", "b"]}, 2, 4),
    "a list of records": _list(_record(x={"type": "boolean"}, y={"type": "null"}), 1),
    "a list of lists": _list(_list({"type": "boolean"}, 0, 2), 0, 2),
    "a tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, _WORD],
        "items": False,
        "minItems": 2,
    },
    "any of some": {"anyOf": [_WORD, {"type": "boolean"}, _list({"type": "null"})]},
    "one of two kinds": {
        "oneOf": [
            _record(kind={"const": "circle"}, radius={"enum": [1, 2, 3]}),
            _record(kind={"const": "square"}, side={"enum": [4, 5, 6]}),
        ]
    },
    "all of some": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "a reference": {
        "$defs": {"point": _record(x={"enum": [0, 1]}, y={"enum": [0, 1]})},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "maxItems": 2,
    },
    "a chain": {
        "$defs": {"node": _record(["v"], v={"type": "boolean"}, next={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    "a function's call": _record(
        name={"const": "get_weather"},
        arguments=_record(["city"], city=_WORD, unit={"enum": ["celsius", "fahrenheit"]}),
    ),
    "a form": _record(
        title=_SHORT,
        priority={"enum": ["low", "medium", "high"]},
        labels=_list(_WORD, 1, 2),
        due={"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    ),
    "with words for readers": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Person",
        "description": "Somebody",
        "type": "object",
        "properties": {"name": {**_WORD, "description": "of theirs", "examples": ["ada"]}},
        "required": ["name"],
        "additionalProperties": False,
    },
}
