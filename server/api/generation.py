"""The RPCs Generate, Resume and Score, and how the events of a stream are sent.

A refused call ends with an error status. An accepted stream ends with an event for each output.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing

import grpc
import numpy as np

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from server.api.context import (
    INTERNAL,
    Context,
    admitted,
    answer,
    counting,
    find,
    off_loop,
    refuse,
    to_the_end,
)
from server.api.convert import accepted_message, error_message, response_message, text_bytes
from server.api.validate import generate_request, keep_s, resume_request, score_request, takes_long
from server.auth.api_keys import Callers
from server.engine.updates import HandedOver, Scored
from server.errors import EngineStopped, RequestError, StepFailed
from server.sessions.opener import SessionOpener
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.reviver import resume
from server.sessions.subscriber import Subscriber

_log = logging.getLogger(__name__)


class GenerationServicer(generation_grpc.GenerationServiceServicer):
    """See generation_service.proto."""

    def __init__(self, registry: SessionRegistry, opener: SessionOpener, callers: Callers) -> None:
        self._registry = registry
        self._opener = opener
        self._callers = callers

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Generate a stream."""
        with counting("Generate", context) as watched:
            opening = self._open(request, watched)
            async with aclosing(stream(self._registry, opening, watched)) as responses:
                async for response in responses:
                    yield response

    async def Resume(
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Send the rest of a stream."""
        # In place of a request that is too large to be parsed there is an error, without a number.
        sequence = getattr(request, "after_sequence", 0)
        with counting("Resume", context) as watched:
            attaching = self._resume(request, watched)
            async with aclosing(stream(self._registry, attaching, watched, sequence)) as responses:
                async for response in responses:
                    yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse | None:
        """Score a prompt: bits per token."""
        return await answer("Score", context, self._score(request, context))

    async def _open(self, request: pb.GenerateRequest, context: Context) -> Attachment:
        caller = admitted(self._callers, context, request)
        model = find(self._registry.models, caller, request.model, request.prompt)
        if not request.idempotency_key:  # a key may name a stream that exists already
            model.require_room()  # the cheapest check first: under overload, most requests end here
        requests = await off_loop(
            takes_long(request),
            generate_request,
            model.bundle,
            request,
            model.config,
            compiles=request.sampling.HasField("grammar"),
        )
        return await self._opener.start(
            model,
            requests,
            caller,
            keep_s(request),
            request.idempotency_key,
            draws_seed=not request.sampling.HasField("seed"),
        )

    async def _resume(self, request: pb.ResumeRequest, context: Context) -> Attachment:
        caller = admitted(self._callers, context, request)
        cursors = await off_loop(takes_long(request), resume_request, request)
        return await resume(self._registry, request.stream_id, caller, cursors)

    async def _score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        caller = admitted(self._callers, context, request)
        model = find(self._registry.models, caller, request.model, request.prompt)
        model.require_room()
        is_long = takes_long(request)
        wanted = await off_loop(is_long, score_request, model.bundle, request)
        size = await off_loop(is_long, text_bytes, model.bundle, wanted.prompt)
        with self._registry.reserving(caller, 1):
            session = model.submit(wanted, caller.name)
        try:
            async for _, event in model.events(session):
                if isinstance(event, RequestError):
                    raise event
                if isinstance(event, Scored):
                    return pb.ScoreResponse(
                        bits_per_token=float(np.mean(event.bits)),
                        bits=event.bits,
                        model=model.bundle.name,
                        fingerprint=model.bundle.fingerprint,
                        text_bytes=size,
                    )
        finally:
            model.cancel(session)
        raise EngineStopped("the stream ended before it was scored; try again later")


async def stream(
    registry: SessionRegistry,
    attaching: Awaitable[Attachment],
    context: Context,
    sequence: int = 0,
) -> AsyncGenerator[pb.GenerateResponse]:
    """The responses of a streaming call, numbered after `sequence`. Refuses a failed attachment."""
    try:
        attachment = await to_the_end(attaching, Attachment.leave)
    except Exception as error:
        if isinstance(error, RequestError) and error.retryable:
            yield pb.GenerateResponse(sequence=sequence + 1, error=error_message(error))
        refuse(context, error)
        return
    durable = registry.is_durable(attachment.session)
    async with aclosing(send(attachment, sequence, durable)) as responses:
        async for response in responses:
            yield response


async def send(
    attachment: Attachment, sequence: int, durable: bool
) -> AsyncGenerator[pb.GenerateResponse]:
    """The responses of an attached stream, numbered after `sequence`, until all outputs end."""
    model, session = attachment.model, attachment.session
    over = set[Subscriber]()
    subscribers = dict(zip(session.streams, attachment.subscribers, strict=True))
    try:
        if not sequence:
            sequence = 1
            accepted = accepted_message(model.bundle, session.lease, durable)
            yield pb.GenerateResponse(sequence=sequence, accepted=accepted)
        async for output, event in model.events(session, attachment.subscribers):
            response = response_message(model.bundle, output.request, event, sequence + 1)
            sequence += 1
            yield response
            if isinstance(event, HandedOver):
                return
            if subscribers[output].is_over:
                over.add(subscribers[output])
    except Exception as error:
        if isinstance(error, grpc.RpcError):  # the client is gone
            raise
        _log.exception("stream %s failed", session.lease.stream_id)
        for subscriber in attachment.subscribers:
            if subscriber not in over and not subscriber.cursor.ended:
                sequence += 1
                failed = StepFailed(INTERNAL)
                yield response_message(model.bundle, subscriber.request, failed, sequence)
    finally:
        attachment.leave()
