"""The RPCs Generate, Resume and Score."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import numpy as np

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from server.api.context import Context, answer, caller_of, find
from server.api.streaming import stream
from server.api.validate import generate_request, keep_s, resume_request, score_request
from server.auth.api_keys import Callers
from server.auth.quota import require_room
from server.engine.updates import Scored
from server.errors import EngineStopped, RequestError
from server.sessions.opener import SessionOpener
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.reviver import resume


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
        opening = self._open(request, context)
        async with aclosing(stream(self._registry, opening, context)) as responses:
            async for response in responses:
                yield response

    async def Resume(
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Send the rest of a stream."""
        attaching, sequence = self._resume(request, context), request.after_sequence
        async with aclosing(stream(self._registry, attaching, context, sequence)) as responses:
            async for response in responses:
                yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse | None:
        """Score a prompt: bits per token."""
        return await answer(context, self._score(request, context))

    async def _open(self, request: pb.GenerateRequest, context: Context) -> Attachment:
        caller = caller_of(self._callers, context)
        model = find(self._registry.models, caller, request.model)
        if not request.idempotency_key:  # a key may name a stream that exists already
            model.require_room()  # the cheapest check first: under overload, most requests end here
        requests = generate_request(model.bundle, request, model.config)
        return await self._opener.start(
            model,
            requests,
            caller,
            keep_s(request),
            request.idempotency_key,
            draws_seed=not request.sampling.HasField("seed"),
        )

    async def _resume(self, request: pb.ResumeRequest, context: Context) -> Attachment:
        caller = caller_of(self._callers, context)
        cursors = resume_request(request)
        if self._registry.held(request.stream_id, caller.name) is None:
            more = sum(not cursor.ended for cursor in cursors) or 1
            require_room(caller, self._registry.running, more)
        return await resume(self._registry, request.stream_id, caller.name, cursors)

    async def _score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        caller = caller_of(self._callers, context)
        model = find(self._registry.models, caller, request.model)
        model.require_room()
        require_room(caller, self._registry.running, 1)
        session = model.submit(score_request(model.bundle, request), caller.name)
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
                    )
        finally:
            model.cancel(session)
        raise EngineStopped("the stream ended before it was scored; try again later")
