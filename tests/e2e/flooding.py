"""Sends a server requests that are too large, one after the other, while it is told to.

    python -m tests.e2e.flooding ADDRESS

A process of its own, so that it disturbs the server alone. For each line of its input, it goes on
until the next one, and prints how many it has sent.
"""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import grpc

from tests.server.api.floods import Flood, floods

MEBIBYTE = 1024 * 1024
SIZES = (4 * MEBIBYTE - 100, 16 * MEBIBYTE)
LIMIT_S = 60.0
_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


def main() -> None:
    """Read lines, and flood the server between the first and the second, and so on."""
    waves = [list(floods(size).values()) for size in SIZES]
    endless = itertools.cycle([flood for both in zip(*waves, strict=True) for flood in both])
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(sys.argv[1], options=unlimited) as channel:
        print("ready", flush=True)
        while sys.stdin.readline():
            over = threading.Event()
            thread = threading.Thread(target=lambda over=over: (sys.stdin.readline(), over.set()))
            thread.start()
            sent = 0
            while not over.is_set():
                send(channel, next(endless))
                sent += 1
            thread.join()
            print(sent, flush=True)


def send(channel: grpc.Channel, flood: Flood) -> None:
    """Send it. It has to be refused."""
    call: Any = channel.unary_stream(flood.path)(flood.content, timeout=LIMIT_S)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        if error.code() not in _CODES:
            raise
    else:
        raise AssertionError(f"{flood.field} passes")


if __name__ == "__main__":
    main()
