"""Connects a command to a server, and chooses the model it works with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from concertina.client import (
    Client,
    ConcertinaError,
    ImageFormat,
    InvalidRequest,
    Model,
    ModelNotFound,
)
from concertina.shown import listed

if TYPE_CHECKING:
    from concertina.client.channel import Access

LOOKUP_TIMEOUT_S = 30.0


@contextmanager
def connected(address: str, access: Access, json_output: bool) -> Iterator[Client]:
    """A client whose errors are printed as JSON if JSON is asked for."""
    try:
        with Client(address, key=access.key, tls=access.tls) as client:
            yield client
    except ConcertinaError as error:
        if not json_output:
            raise
        report = {
            "type": type(error).__name__,
            "message": str(error),
            "code": error.code,
            "retryable": error.retryable,
            "retry_after": error.retry_after,
            "field": error.field,
            "limit": error.limit,
        }
        print(json.dumps({"error": report}), file=sys.stderr)
        raise typer.Exit(1) from None


def choose_model(client: Client, name: str, modality: str) -> Model:
    """The model with this name; without a name, the only one of this modality."""
    if name:
        model = client.model(name, timeout=LOOKUP_TIMEOUT_S)
        if model.modality != modality:
            raise InvalidRequest(f"{name} writes {model.modality}, this needs {modality}")
        return model
    served = client.models(timeout=LOOKUP_TIMEOUT_S)
    able = [model for model in served if model.modality == modality]
    if len(able) == 1:
        return able[0]
    if not able:
        names = listed(f"{model.name} ({model.modality})" for model in served) or "nothing"
        raise ModelNotFound(f"no {modality} model is served at {client.address}, only {names}")
    names = listed(model.name for model in able)
    raise InvalidRequest(f"several {modality} models are served: choose with --model: {names}")


def modalities(client: Client, name: str) -> set[str]:
    """What the model with this name writes; without a name, what the models that are served do."""
    if name:
        return {client.model(name, timeout=LOOKUP_TIMEOUT_S).modality}
    return {model.modality for model in client.models(timeout=LOOKUP_TIMEOUT_S)}


def image_format(model: Model) -> ImageFormat:
    if model.image is None:
        raise InvalidRequest(f"{model.name} does not say what size its images have")
    return model.image
