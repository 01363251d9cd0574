"""Sessions: what streams have become, paused, continued, copied, carried away and brought back."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from concertina.v1 import generation_service_pb2 as generation_pb
from concertina.v1 import session_service_pb2 as pb
from concertina.v1 import session_service_pb2_grpc as session_grpc
from server.api.context import Context, refusal, refuse, send
from server.api.prompt import prompt_tokens
from server.api.validate import generate_request
from server.auth.api_keys import Caller, Callers
from server.auth.quota import require_room
from server.engine.engine import Engine
from server.engine.events import Finish, FinishReason
from server.engine.stream import Past, Stream
from server.errors import InvalidRequest, PermissionDenied, Unsuitable
from server.sessions.registry import Following, Sessions, new_name
from server.sessions.table import Session

_PART_BYTES = 1024 * 1024
_MOST_COPIES = 128
_PAGE, _LARGEST_PAGE = 100, 1000

_Response = TypeVar("_Response")


class SessionServicer(session_grpc.SessionServiceServicer):
    """See session_service.proto."""

    def __init__(self, sessions: Sessions, callers: Callers) -> None:
        self._sessions = sessions
        self._callers = callers

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse | None:
        """Stop a stream and keep its state."""

        async def pause() -> pb.PauseResponse:
            engine, session = await self._find(request.stream_id, self._callers.of(context))
            if not session.terms.keep_s:
                raise Unsuitable("the stream was not asked to be kept: generate it with keep")
            await engine.pause(session)
            return pb.PauseResponse(session=session_message(engine, session))

        return await _answer(context, pause())

    async def Continue(
        self, request: pb.ContinueRequest, context: Context
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        """Go on with a session that rests."""
        try:
            caller = self._callers.of(context)
            engine, session = await self._find(request.stream_id, caller)
            _require_rest(session)
            require_room(caller, self._sessions.running, 1)
            following = await self._continue(engine, session, request)
        except Exception as error:
            if (said := refusal(error)) is not None:
                yield said
            refuse(context, error)
            return
        durable = self._sessions.is_durable(following.session)
        async with aclosing(send(following, 0, durable)) as responses:
            async for response in responses:
                yield response

    async def Fork(self, request: pb.ForkRequest, context: Context) -> pb.ForkResponse | None:
        """Copies of a session that rests."""

        async def fork() -> pb.ForkResponse:
            caller = self._callers.of(context)
            if not 1 <= request.n <= _MOST_COPIES:
                raise InvalidRequest(f"n is {request.n}; it must be between 1 and {_MOST_COPIES}")
            engine, session = await self._find(request.stream_id, caller)
            _require_rest(session)
            copies = [await self._copy(engine, session) for _ in range(request.n)]
            return pb.ForkResponse(stream_ids=copies)

        return await _answer(context, fork())

    async def Export(
        self, request: pb.ExportRequest, context: Context
    ) -> AsyncIterator[pb.ExportResponse]:
        """A session that rests, sealed, in parts."""
        try:
            engine, session = await self._find(request.stream_id, self._callers.of(context))
            _require_rest(session)
            if (keeper := self._sessions.keeper) is None:
                raise Unsuitable("this server keeps no snapshots: start it with --snapshots URI")
            terms, pasts = session.terms, session.pasts
            sealed = await asyncio.to_thread(keeper.export, engine.bundle, terms, pasts)
        except Exception as error:
            refuse(context, error)
            return
        for at in range(0, len(sealed), _PART_BYTES):
            last = at + _PART_BYTES >= len(sealed)
            digest = hashlib.sha256(sealed).digest() if last else b""
            yield pb.ExportResponse(part=sealed[at : at + _PART_BYTES], sha256=digest)

    async def Import(
        self, requests: AsyncIterator[pb.ImportRequest], context: Context
    ) -> pb.ImportResponse | None:
        """A session made of an exported snapshot."""

        async def adopt() -> pb.ImportResponse:
            caller = self._callers.of(context)
            if (keeper := self._sessions.keeper) is None:
                raise Unsuitable("this server keeps no snapshots: start it with --snapshots URI")
            sealed = await self._received(requests)
            stored = await asyncio.to_thread(keeper.import_, sealed, caller.name)
            _require_model(caller, stored.header.model)
            engine, session = await self._sessions.adopt(stored, new_name())
            return pb.ImportResponse(session=session_message(engine, session))

        return await _answer(context, adopt())

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse | None:
        """Forget a session."""

        async def delete() -> pb.DeleteResponse:
            caller = self._callers.of(context)
            await self._sessions.delete(request.stream_id, caller.name)
            return pb.DeleteResponse()

        return await _answer(context, delete())

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse | None:
        """The caller's sessions."""

        async def list_sessions() -> pb.ListSessionsResponse:
            caller = self._callers.of(context)
            size = request.page_size or _PAGE
            if size > _LARGEST_PAGE:
                raise InvalidRequest(f"page_size is {size}; it must be at most {_LARGEST_PAGE}")
            held = {
                session.terms.stream_id: session_message(engine, session)
                for engine in self._sessions.holders
                for session in engine.sessions(caller.name)
            }
            for stream_id in await self._sessions.stored(caller.name):
                stored = pb.Session(stream_id=stream_id, phase=pb.SESSION_PHASE_STORED)
                held.setdefault(stream_id, stored)
            names = sorted(name for name in held if name > request.page_token)
            return pb.ListSessionsResponse(
                sessions=[held[name] for name in names[:size]],
                next_page_token=names[size - 1] if len(names) > size else "",
            )

        return await _answer(context, list_sessions())

    async def _find(self, stream_id: str, caller: Caller) -> tuple[Engine, Session]:
        engine, session = await self._sessions.at_rest(stream_id, caller.name)
        _require_model(caller, engine.bundle.name)
        return engine, session

    async def _continue(
        self, engine: Engine, session: Session, request: pb.ContinueRequest
    ) -> Following:
        more = _more_tokens(engine, request)
        stream = session.streams[0]
        if len(session.streams) > 1:
            raise Unsuitable(f"the stream has {len(session.streams)} outputs; only one can go on")
        origin = generation_pb.GenerateRequest.FromString(session.terms.origin)
        if request.HasField("sampling"):
            seed = origin.sampling.seed
            origin.sampling.CopyFrom(request.sampling)
            if not request.sampling.HasField("seed"):
                origin.sampling.seed = seed
        if request.HasField("stopping"):
            origin.stopping.CopyFrom(request.stopping)
        if more or not _is_paused(stream):
            past = _extend(origin, stream, more)
        else:
            past = _go_on(origin, stream, request, engine.bundle.context)
        requests = generate_request(engine.bundle, origin, engine.config)
        terms = replace(session.terms, origin=origin.SerializeToString(deterministic=True))
        return await self._sessions.reopen(engine, terms, requests, [past])

    async def _copy(self, engine: Engine, session: Session) -> str:
        origin = generation_pb.GenerateRequest.FromString(session.terms.origin)
        origin.sampling.seed = secrets.randbits(63)
        origin.idempotency_key = ""
        terms = replace(
            session.terms,
            stream_id=new_name(),
            origin=origin.SerializeToString(deterministic=True),
        )
        requests = generate_request(engine.bundle, origin, engine.config)
        following = await self._sessions.reopen(engine, terms, requests, session.pasts)
        engine.leave(following.session, following.readers)
        return terms.stream_id

    async def _received(self, requests: AsyncIterator[pb.ImportRequest]) -> bytes:
        engines = self._sessions.engines.values()
        largest = max((engine.largest_snapshot for engine in engines), default=0)
        parts, size, digest = [], 0, b""
        async for request in requests:
            size += len(request.part)
            if len(request.part) > _PART_BYTES or size > largest:
                raise InvalidRequest(
                    f"a part may have {_PART_BYTES} bytes, and a snapshot {largest}: "
                    f"this is a part of {len(request.part)}, and {size} in all"
                )
            parts.append(request.part)
            digest = request.sha256
        sealed = b"".join(parts)
        if digest != hashlib.sha256(sealed).digest():
            raise InvalidRequest(
                f"sha256 of the last part is not that of the {size} bytes which came: try again"
            )
        return sealed


def session_message(engine: Engine, session: Session) -> pb.Session:
    """A session that an engine holds."""
    streams = session.streams
    message = pb.Session(
        stream_id=session.terms.stream_id,
        model=engine.bundle.name,
        phase=_phase(session),
        outputs=len(streams),
        prompt_tokens=len(streams[0].request.prompt) - 1,
        generated_tokens=sum(stream.generated for stream in streams),
        state_bytes=sum(engine.held_bytes(stream) for stream in streams),
    )
    if (expires := engine.forgets_at(session)) is not None:
        message.expires.FromNanoseconds(int(expires * 1e9))
    return message


def _phase(session: Session) -> pb.SessionPhase:
    if not session.ended:
        return pb.SESSION_PHASE_RUNNING
    paused = any(_is_paused(stream) for stream in session.streams)
    return pb.SESSION_PHASE_PAUSED if paused else pb.SESSION_PHASE_FINISHED


def _is_paused(stream: Stream) -> bool:
    ending = stream.ending
    return isinstance(ending, Finish) and ending.reason is FinishReason.PAUSED


def _require_rest(session: Session) -> None:
    if not session.ended:
        raise Unsuitable("the stream is running: pause it first, or wait for its end")
    if not all(isinstance(stream.ending, Finish) for stream in session.streams):
        raise Unsuitable("the stream failed: only what was paused or finished can go on")


def _require_model(caller: Caller, model: str) -> None:
    if not caller.may_use(model):
        raise PermissionDenied(f"key {caller.name!r} is not for model {model!r}")


def _more_tokens(engine: Engine, request: pb.ContinueRequest) -> list[int]:
    """The tokens of a prompt that goes on."""
    if not request.HasField("prompt"):
        return []
    if request.prompt.HasField("label") or request.prompt.WhichOneof("content") == "image":
        raise InvalidRequest("prompt must be text or tokens: what goes on has no label")
    more: list[int] = prompt_tokens(engine.bundle, request.prompt, room=1)[1:].tolist()
    return more


def _extend(origin: generation_pb.GenerateRequest, stream: Stream, more: list[int]) -> Past:
    """Make all that a stream knows, and more, the prompt of what comes."""
    known = [*stream.request.prompt[1:].tolist(), *stream.history]
    parked = stream.parked
    if not more and parked is not None and parked.pushed > len(known):
        raise Unsuitable("the stream ended by its model's end token: give a prompt to go on behind")
    label = origin.prompt.label if origin.prompt.HasField("label") else None
    tokens = generation_pb.TokenIds(ids=[*known, *more])
    origin.prompt.CopyFrom(generation_pb.Prompt(tokens=tokens, label=label))
    return Past(array(stream.history.typecode), parked)


def _go_on(
    origin: generation_pb.GenerateRequest,
    stream: Stream,
    request: pb.ContinueRequest,
    context: int,
) -> Past:
    """As if the stream had never paused."""
    told = len(stream.history)
    if request.stopping.HasField("max_tokens"):
        more, left = request.stopping.max_tokens, context - told
        if not 1 <= more <= left:
            raise InvalidRequest(f"stopping.max_tokens is {more}; it must be between 1 and {left}")
        origin.stopping.max_tokens = told + more
    characters = stream.base_characters + len(stream.backlog.text)
    return replace(
        stream.past, parked=stream.parked, finish=None, base_tokens=told, base_characters=characters
    )


async def _answer(context: Context, answer: Awaitable[_Response]) -> _Response | None:
    try:
        return await answer
    except Exception as error:
        refuse(context, error)
        return None
