"""The events of a stream as the page reads them: a line of JSON for each."""

from __future__ import annotations

import base64
import json
import math
from typing import Any, Final

from concertina.client import Accepted, Event, Finished, TokenLogprobs, Tokens

_MOST_BITS: Final = 9999.0  # a token that could not be drawn has infinitely many


def line(told: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def told(event: Event) -> dict[str, Any]:
    """What the page is told of an event."""
    match event:
        case Accepted():
            return {
                "type": "accepted",
                "id": event.stream_id,
                "model": event.model,
                "fingerprint": event.fingerprint,
                "seed": str(event.seed),  # a number of JavaScript has 53 bits
                "temperature": event.sampling.temperature,
                "prompt_tokens": event.prompt_tokens,
                "max_tokens": event.stopping.max_tokens,
                "durable": event.durable,
            }
        case Tokens():
            return {
                "type": "tokens",
                "at": event.first_position,
                "ids": event.ids,
                "text": event.text,
                "rgb": base64.b64encode(event.rgb).decode(),
                "bits": [_bits(each.logprob) for each in event.logprobs],
                "pieces": [[*each.piece] for each in event.logprobs],
                "top": [_top(each) for each in event.logprobs],
            }
        case Finished():
            return {
                "type": "finished",
                "reason": event.reason,
                "prompt_tokens": event.usage.prompt_tokens,
                "generated_tokens": event.usage.generated_tokens,
                "queue_time": event.usage.queue_time,
                "time_to_first_token": event.usage.time_to_first_token,
                "total_time": event.usage.total_time,
                "state_bytes": event.usage.state_bytes,
            }
    return {"type": "prompt"}


def _bits(logprob: float) -> float:
    """The surprisal of a token, in bits."""
    return round(min(_MOST_BITS, -logprob / math.log(2)), 4)


def _top(each: TokenLogprobs) -> list[tuple[int, str, float]]:
    """The likeliest tokens: id, text (none for a pixel), bits."""
    names = each.top_tokens or ("",) * len(each.top_ids)
    return [
        (token, name, _bits(logprob))
        for token, name, logprob in zip(each.top_ids, names, each.top_logprobs, strict=True)
    ]
