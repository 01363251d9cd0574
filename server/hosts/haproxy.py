"""What HAProxy says about the replicas behind it."""

from __future__ import annotations

import csv
import io
import time
import urllib.request

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.1


def wait_for_replicas(stats_port: int, backend: str, replicas: int, limit_s: float) -> None:
    """Return when HAProxy passes calls to all replicas. Raises TimeoutError after `limit_s`.

    Until it knows them, Ray's Python proxy stands in.
    """
    deadline = time.monotonic() + limit_s
    while (reached := _count_replicas(stats_port, backend)) != replicas:
        if time.monotonic() > deadline:
            raise TimeoutError(f"HAProxy reaches {reached} of {replicas} replicas")
        time.sleep(_POLL_SECONDS)


def _count_replicas(stats_port: int, backend: str) -> int:
    """Servers of the backend that are up, the stand-in left out."""
    url = f"http://127.0.0.1:{stats_port}/stats;csv"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as page:
            rows = list(csv.DictReader(io.StringIO(page.read().decode().removeprefix("# "))))
    except OSError:  # it starts anew whenever the replicas change
        return 0
    servers = [row for row in rows if row["pxname"] == backend and row["svname"] != "BACKEND"]
    return sum(row["bck"] == "0" and row["status"].startswith("UP") for row in servers)
