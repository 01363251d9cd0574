"""A bucket on the loopback that speaks as S3 does, and whose failures are real ones of HTTP."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any
from uuid import uuid4

_NAME = "snapshots"
_SPARED = "HTTP_X_SPARED"  # a request with this header is ours, and never fails
_SLOWEST_S = 3.0
_REFUSALS = ("500 Internal Error", "503 Slow Down")
_KEY = re.compile(r"<Key>[^<]*?([^</]+)/[^</]+</Key>")


class Trouble(StrEnum):
    """How requests fail."""

    NONE = "works"
    REFUSES = "refuses"  # 500 or 503, nothing is done
    CUTS = "cuts"  # the connection breaks, nothing is done
    LOSES = "loses answers"  # it is done, then the connection breaks
    SLOWS = "is slow"
    HANGS = "hangs"  # it is done when the trouble is over, though nobody may wait for it any more


class Bucket:
    """Objects in the memory of this process. `fail` says how requests fail from now on.

    requests: how many there were under each trouble. moments: how often each was begun.
    """

    def __init__(self) -> None:
        self.requests, self.moments = Counter[Trouble](), Counter[Trouble]()
        self.port = 0
        self._trouble, self._share = Trouble.NONE, 1.0
        self._over = threading.Event()  # the trouble is
        self._random = random.Random(1)
        # Moto looks whether an object is there, then puts it; S3 does both at once.
        self._one = threading.Lock()
        self._serve: Callable[..., Iterable[bytes]]

    @property
    def uri(self) -> str:
        """Where servers have their snapshots."""
        return f"s3://{_NAME}/{uuid4().hex}"

    @property
    def environment(self) -> dict[str, str]:
        """How servers find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # else botocore hides short failures from its user
        }

    @property
    def fails(self) -> bool:
        """Whether some requests fail now."""
        return self._trouble is not Trouble.NONE

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve it."""
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            """Prints no line for each request."""

            def log(self, type: str, message: str, *args: Any) -> None:
                pass

        self._serve = DomainDispatcherApplication(create_backend_app)
        server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, name="bucket", daemon=True)
        thread.start()
        try:
            self._ask("PUT", "")
            yield
        finally:
            self.fail(Trouble.NONE)
            server.shutdown()
            thread.join()
            server.server_close()

    def fail(self, trouble: Trouble, share: float = 1.0) -> None:
        """Let requests fail, as many as `share` says. What hangs goes on."""
        self._over.set()
        self._over = threading.Event()
        self._trouble, self._share = trouble, share
        self.moments[trouble] += 1

    def streams(self) -> set[str]:
        """Names of the streams of which something is stored."""
        found, after = set[str](), ""
        while True:
            page = self._ask("GET", f"?list-type=2{after}")
            found.update(_KEY.findall(page))
            token = re.search("<NextContinuationToken>(.*?)<", page)
            if token is None:
                return found
            after = f"&continuation-token={urllib.parse.quote(token[1])}"

    def _ask(self, method: str, query: str) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{_NAME}{query}", method=method, headers={"X-Spared": "1"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return str(answer.read().decode())

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """A WSGI application."""
        trouble, over = self._trouble, self._over
        if _SPARED in environ or self._random.random() >= self._share:
            trouble = Trouble.NONE
        self.requests[trouble] += 1
        if trouble is Trouble.REFUSES:
            status = self._random.choice(_REFUSALS)
            start_response(status, [("Content-Type", "application/xml")])
            code = status[4:].replace(" ", "")
            return [f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode()]
        if trouble is Trouble.CUTS:
            _cut(environ)
        if trouble is Trouble.HANGS:
            over.wait()
        if trouble is Trouble.SLOWS:
            time.sleep(self._random.uniform(0, _SLOWEST_S))
        with self._one:
            answer = list(self._serve(environ, start_response))
        if trouble is Trouble.LOSES:
            _cut(environ)
        return answer


def _cut(environ: dict[str, Any]) -> None:
    """Break the connection of a request."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError
