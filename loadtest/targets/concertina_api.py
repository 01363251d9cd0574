"""One request becomes one record: what a stream brought, and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter_ns

from concertina.client import (
    Accepted,
    AsyncClient,
    ConcertinaError,
    ContractViolation,
    Finished,
    StreamCut,
    Tokens,
)
from loadtest.workload import Request

CANCELLED = "Cancelled"
REFUSED = "Overloaded RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class Record:
    """One stream as observed. Times are readings of one monotonic clock.

    stream_id: empty if the stream was never accepted.
    started_ns: before the call is made, so that connecting and queueing count.
    accepted_ns: None if the stream was never accepted.
    tokens_ns: when each token event arrived.
    counts: how many tokens each of them brought.
    ended_ns: when the last event or the failure arrived.
    prompt_tokens: as the server counts them.
    failure: kind of the failure, empty for none.
    retry_after_s: how long the server asks to wait after a failure, None without such a request.
    violation: how the server breaks the contract of the stream, empty if it keeps it.
    resumed: how often the stream was lost and then resumed.
    """

    stream_id: str
    started_ns: int
    accepted_ns: int | None
    tokens_ns: tuple[int, ...]
    counts: tuple[int, ...]
    ended_ns: int
    prompt_tokens: int
    failure: str
    retry_after_s: float | None
    violation: str
    resumed: int = 0

    @property
    def whole(self) -> bool:
        """Whether the stream brought all that was asked for, by the contract."""
        return not self.failure and not self.violation


@dataclass(slots=True)
class Tally:
    """For a progress bar: streams that run and have ended, tokens so far."""

    running: int = 0
    ended: int = 0
    tokens: int = 0


async def send(
    client: AsyncClient,
    request: Request,
    *,
    model: str,
    timeout_s: float,
    keep_s: float = 0.0,
    tally: Tally,
) -> Record:
    """Runs one stream to its end and returns what was observed.

    keep_s: how long the server keeps a lost stream; 0: it ends with its call.

    A failure is not raised but recorded, even the cancellation of the calling task: an interrupted
    run keeps what it observed.
    """
    accepted: Accepted | None = None
    accepted_ns: int | None = None
    ended_ns: int | None = None
    tokens_ns: list[int] = []
    counts: list[int] = []
    failure = violation = ""
    retry_after_s: float | None = None
    resumed = 0

    tally.running += 1
    started_ns = perf_counter_ns()
    try:
        async with client.generate(
            request.prompt,
            timeout=timeout_s,
            keep=keep_s,
            model=model,
            seed=request.seed,
            max_tokens=request.output_tokens,
            ignore_eos=True,
        ) as stream:
            async for event in stream:
                now_ns, resumed = perf_counter_ns(), stream.resumed
                match event:
                    case Accepted():
                        accepted, accepted_ns = event, now_ns
                    case Tokens(ids=ids):
                        tokens_ns.append(now_ns)
                        counts.append(len(ids))
                        tally.tokens += len(ids)
                    case Finished():
                        ended_ns = now_ns
    except (ContractViolation, StreamCut) as error:
        violation = str(error)
    except ConcertinaError as error:
        failure = f"{type(error).__name__} {error.code}".rstrip()
        retry_after_s = error.retry_after
    except asyncio.CancelledError:
        failure = CANCELLED
    finally:
        tally.running -= 1
        tally.ended += 1

    if not failure and not violation and accepted:
        violation = _miscount(request, accepted.prompt_tokens, sum(counts))
    return Record(
        stream_id=accepted.stream_id if accepted else "",
        started_ns=started_ns,
        accepted_ns=accepted_ns,
        tokens_ns=tuple(tokens_ns),
        counts=tuple(counts),
        ended_ns=ended_ns or perf_counter_ns(),
        prompt_tokens=accepted.prompt_tokens if accepted else 0,
        failure=failure,
        retry_after_s=retry_after_s,
        violation=violation,
        resumed=resumed,
    )


def _miscount(request: Request, prompt_tokens: int, output_tokens: int) -> str:
    """How a finished stream's numbers of tokens differ from the request; empty if they do not.

    Text prompts are not counted: only the server knows how many tokens they are.
    """
    asked = None
    if not isinstance(request.prompt, str):
        asked = len(request.prompt or ()) - (not request.first_counts)
    if asked is not None and prompt_tokens != asked:
        return f"the server counts {prompt_tokens} prompt tokens, {asked} were sent"
    if output_tokens != request.output_tokens:
        return f"{output_tokens} tokens arrived, {request.output_tokens} were asked for"
    return ""
