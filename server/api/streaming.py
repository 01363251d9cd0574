"""Sends the events of a stream until all outputs have ended.

A refused call ends with an error status. An accepted stream ends with an event for each output.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing

import grpc

from concertina.v1 import generation_service_pb2 as pb
from server.api.context import INTERNAL, Context, refuse
from server.api.convert import accepted_message, error_message, response_message
from server.engine.updates import HandedOver
from server.errors import RequestError, StepFailed
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.subscriber import Subscriber

_log = logging.getLogger(__name__)


async def stream(
    registry: SessionRegistry,
    attaching: Awaitable[Attachment],
    context: Context,
    sequence: int = 0,
) -> AsyncGenerator[pb.GenerateResponse]:
    """The responses of a streaming call, numbered after `sequence`. Refuses a failed attachment."""
    try:
        attachment = await attaching
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
