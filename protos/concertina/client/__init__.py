"""Reads typed streams from a Concertina server, in blocking and in asyncio code.

with Client("127.0.0.1:9000") as client, client.generate("def ", seed=1) as stream:
    for event in stream:
        match event:
            case Tokens(text=text):
                print(text, end="", flush=True)
"""

from __future__ import annotations

from concertina.client.channel import Tls
from concertina.client.client import DEFAULT_ADDRESS, AsyncClient, Client
from concertina.client.completions import Completion
from concertina.client.errors import (
    AccessDenied,
    ConcertinaError,
    ContractViolation,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    ServerUnavailable,
    SessionNotFound,
    SessionUnsuitable,
    SnapshotRefused,
    StreamCut,
)
from concertina.client.events import (
    Accepted,
    Cursor,
    Event,
    Finished,
    FinishReason,
    Output,
    PromptLogprobs,
    Sampling,
    Stopping,
    TokenLogprobs,
    Tokens,
    Usage,
)
from concertina.client.layout import Fold, StateTensor
from concertina.client.models import ImageFormat, Model, Score, TokenList
from concertina.client.parameters import ContinueParameters, GenerateParameters
from concertina.client.sessions import AsyncSessions, Session, SessionPhase, Sessions
from concertina.client.streams import AsyncStream, Stream

__all__ = [
    "DEFAULT_ADDRESS",
    "Accepted",
    "AccessDenied",
    "AsyncClient",
    "AsyncSessions",
    "AsyncStream",
    "Client",
    "Completion",
    "ConcertinaError",
    "ContinueParameters",
    "ContractViolation",
    "Cursor",
    "DeadlineExceeded",
    "Event",
    "FinishReason",
    "Finished",
    "Fold",
    "GenerateParameters",
    "GenerationFailed",
    "ImageFormat",
    "InvalidRequest",
    "Model",
    "ModelNotFound",
    "Output",
    "Overloaded",
    "PromptLogprobs",
    "Sampling",
    "Score",
    "ServerError",
    "ServerUnavailable",
    "Session",
    "SessionNotFound",
    "SessionPhase",
    "SessionUnsuitable",
    "Sessions",
    "SnapshotRefused",
    "StateTensor",
    "Stopping",
    "Stream",
    "StreamCut",
    "Tls",
    "TokenList",
    "TokenLogprobs",
    "Tokens",
    "Usage",
]
