"""How a paused or finished session continues: with what request, and from which checkpoint."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace

from concertina.v1 import generation_service_pb2 as generation_pb
from concertina.v1 import session_service_pb2 as pb
from server.api.convert import prompt_ids, request_message
from server.api.prompt import prompt_tokens
from server.api.validate import generate_request
from server.checkpoint import Checkpoint
from server.engine.stream import Stream
from server.errors import InvalidRequest, Unsuitable
from server.request import Lease
from server.sessions.served_model import ServedModel
from server.sessions.table import Session


def continued(
    model: ServedModel, session: Session, request: pb.ContinueRequest
) -> tuple[Lease, Checkpoint]:
    """The lease and the checkpoint with which an ended session continues.

    Times count from this call. Raises Unsuitable and InvalidRequest.
    """
    more = _more_tokens(model, request)
    if len(session.streams) > 1:
        raise Unsuitable(
            f"the stream has {len(session.streams)} outputs; only a stream of 1 can continue"
        )
    output, asked = session.streams[0], request_message(model.bundle, session.lease)
    if request.HasField("sampling"):
        seed = asked.sampling.seed
        asked.sampling.CopyFrom(request.sampling)
        if not request.sampling.HasField("seed"):
            asked.sampling.seed = seed
    if request.HasField("stopping"):
        asked.stopping.CopyFrom(request.stopping)
    if more or not output.was_paused:
        checkpoint = _extend(model, asked, output, more)
    else:
        checkpoint = _unpause(asked, output, request, model.bundle.context)
    requests = generate_request(model.bundle, asked, model.config)
    grammar = requests[0].sampling.grammar
    if grammar is not None and not grammar.beginning.copy().fits(checkpoint.generated):
        raise InvalidRequest(
            "sampling.grammar does not allow what the stream has generated before its pause: give "
            "one that does, or none, or a prompt, after which the grammar begins anew",
            field="sampling.grammar",
        )
    lease = replace(
        session.lease,
        requests=requests,
        accepted_at=time.time(),
        epoch=session.lease.epoch + 1,
    )
    return lease, checkpoint


def _more_tokens(model: ServedModel, request: pb.ContinueRequest) -> list[int]:
    """The prompt tokens to add, maybe none. Raises InvalidRequest."""
    if not request.HasField("prompt"):
        return []
    if request.prompt.HasField("label") or request.prompt.WhichOneof("content") == "image":
        raise InvalidRequest(
            "prompt must be text or tokens: a stream that continues takes no label or image"
        )
    if request.prompt.WhichOneof("content") == "messages":
        raise InvalidRequest(
            "prompt.messages was given, but a stream that continues has its beginning: give text "
            "or tokens, or start a new stream with the whole conversation",
            field="prompt.messages",
        )
    prompt = prompt_tokens(model.bundle, request.prompt, room=1)
    more: list[int] = prompt_ids(model.bundle, prompt).tolist()
    return more


def _extend(
    model: ServedModel, asked: generation_pb.GenerateRequest, output: Stream, more: list[int]
) -> Checkpoint:
    """Continue with a new prompt: the former prompt, the output, and `more`.

    Sets the prompt of `asked`. Returns the checkpoint to continue from.
    """
    tokens_so_far = [*prompt_ids(model.bundle, output.request.prompt).tolist(), *output.history]
    saved = output.saved
    pushed_at_most = len(output.request.prompt) + len(output.history)
    if not more and saved is not None and saved.pushed > pushed_at_most:
        raise Unsuitable("the stream ended by an end token: give a prompt to continue with")
    label = asked.prompt.label if asked.prompt.HasField("label") else None
    tokens = generation_pb.TokenIds(ids=[*tokens_so_far, *more])
    asked.prompt.CopyFrom(generation_pb.Prompt(tokens=tokens, label=label))
    return Checkpoint(array(output.history.typecode), saved)


def _unpause(
    asked: generation_pb.GenerateRequest,
    output: Stream,
    request: pb.ContinueRequest,
    context: int,
) -> Checkpoint:
    """Continue a paused stream as if it had not been paused.

    Sets `max_tokens` and `min_tokens` of `asked`, which count from here in the `request`. Returns
    the checkpoint to continue from.
    """
    generated, least = len(output.history), request.stopping.min_tokens
    if request.stopping.HasField("max_tokens"):
        more, left = request.stopping.max_tokens, context - generated
        if not 1 <= more <= left:
            raise InvalidRequest(f"stopping.max_tokens is {more}; it must be between 1 and {left}")
        if least > more:
            raise InvalidRequest(
                f"stopping.min_tokens is {least}; it must be at most {more}, which is max_tokens"
            )
        asked.stopping.max_tokens = generated + more
    if least:
        asked.stopping.min_tokens = generated + least
    backlog = output.backlog
    return replace(
        output.checkpoint,
        saved=output.saved,
        finish=None,
        queue_s=None,
        first_token_s=None,
        base_tokens=generated,
        base_characters=output.base_characters + (len(backlog.text) if backlog else 0),
    )
