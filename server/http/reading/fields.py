"""Reads the fields of a body. An absent field and `null` are the same: None."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request

from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.settings import GatewaySettings

Body: TypeAlias = Mapping[str, Any]
"""The JSON object of a request."""


async def read_body(request: Request, settings: GatewaySettings) -> Body:
    """The JSON object that a request sends. Raises HttpError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send other types without asking
        raise HttpError(
            415, f"Content-Type is {shown(kind)}: send JSON with `Content-Type: application/json`"
        )
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                raw += part
                if len(raw) > settings.max_body_bytes:
                    raise HttpError(
                        413,
                        f"the body has more than {settings.max_body_bytes:,} bytes, the limit: "
                        "send a shorter prompt or fewer of them",
                    )
    except TimeoutError:
        limit = f"{settings.body_seconds:g} s"
        raise HttpError(408, f"the body did not arrive within {limit}: send it again") from None
    except ClientDisconnect:
        raise HttpError(499, "the caller is gone") from None
    try:
        body = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        what = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise HttpError(400, f"the body is not JSON: {what}") from None
    if not isinstance(body, dict):
        raise HttpError(400, f"the body is {shown(body)}: it must be a JSON object")
    return body


def number(body: Body, name: str) -> float | None:
    """A number. Raises HttpError."""
    value = body.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be a number")


def integer(body: Body, name: str) -> int | None:
    """A whole number, which may be written as 1.0. Raises HttpError."""
    value = number(body, name)
    if isinstance(value, float):
        if not value.is_integer():
            raise invalid(name, f"{name} is {shown(value)}: it must be a whole number")
        return int(value)
    return value


def boolean(body: Body, name: str) -> bool | None:
    """True or false. Raises HttpError."""
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be true or false")


def text(body: Body, name: str) -> str | None:
    """A text. Raises HttpError."""
    value = body.get(name)
    if value is None or isinstance(value, str):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be a text")


def texts(body: Body, name: str) -> list[str] | None:
    """A text, or a list of texts. Raises HttpError."""
    value = body.get(name)
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be a text or a list of texts")


def integers(body: Body, name: str) -> list[int] | None:
    """A list of whole numbers. Raises HttpError."""
    value = body.get(name)
    if value is None or is_ids(value):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be a list of whole numbers")


def table(body: Body, name: str) -> Body | None:
    """An object. Raises HttpError."""
    value = body.get(name)
    if value is None or isinstance(value, dict):
        return value
    raise invalid(name, f"{name} is {shown(value)}: it must be an object")


def is_ids(value: object) -> bool:
    """Whether this is a list of whole numbers."""
    return isinstance(value, list) and all(type(each) is int for each in value)
