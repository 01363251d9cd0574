"""Connects a command to a server, and chooses the model it works with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from concertina.cli.options import Address, Ca, Cert, CertKey, KeyFile, UseTls, access
from concertina.client import (
    DEFAULT_ADDRESS,
    Client,
    ConcertinaError,
    ImageFormat,
    InvalidRequest,
    Model,
    ModelNotFound,
)
from concertina.shown import listed

LOOKUP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Server:
    """Where a command finds its server, and what it shows to it: an option for each field."""

    address: Address = DEFAULT_ADDRESS
    key_file: KeyFile = None
    tls: UseTls = False
    ca: Ca = None
    cert: Cert = None
    cert_key: CertKey = None


@contextmanager
def connected(server: Server, json_output: bool = False) -> Iterator[Client]:
    """A client whose errors are printed as JSON if JSON is asked for."""
    shown = access(server.key_file, server.tls, server.ca, server.cert, server.cert_key)
    try:
        with Client(server.address, key=shown.key, tls=shown.tls) as client:
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
