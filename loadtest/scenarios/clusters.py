"""Two servers with one store of snapshots, which can be killed and come back."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from loadtest.servers import free_ports, is_serving, new_snapshot_key, start

_KILL_LIMIT_S = 10.0
_STOP_LIMIT_S = 60.0


@dataclass(frozen=True)
class Store:
    """Where the servers have their snapshots. fails: whether it may be away when they start."""

    uri: str
    environment: Mapping[str, str] = field(default_factory=dict)
    fails: bool = False


class Processes:
    """Two servers without Ray, each in a process and at a port of its own."""

    def __init__(self, bundle: Path, store: Store, logs: Path | None = None) -> None:
        self._bundle = bundle
        self._logs = logs
        self._options = [*_options(store), "--local"]
        self._ports = free_ports(4)
        self._environment = {**store.environment, **new_snapshot_key()}
        self._servers: list[psutil.Popen] = []

    @property
    def addresses(self) -> list[str]:
        """One for each order of the two: gRPC tries the other when the first is not there."""
        one, two = (f"127.0.0.1:{port}" for port in self._ports[:2])
        return [f"ipv4:{one},{two}", f"ipv4:{two},{one}"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start both servers, and end both."""
        try:
            for index in range(2):
                self._servers.append(self._start(index))
            yield
        finally:
            for server in self._servers:
                server.kill()
                server.wait(_KILL_LIMIT_S)

    def is_healthy(self) -> bool:
        """Whether both answer."""
        return all(is_serving(f"127.0.0.1:{port}") for port in self._ports[:2])

    def kill(self, rng: random.Random, both: bool) -> None:
        """Kill one of them, or both, and start others in their place."""
        for index in (0, 1) if both else [rng.randrange(2)]:
            self.restart(index, signal.SIGKILL)

    def restart(self, index: int, by: signal.Signals) -> None:
        """End the server at this index of the first list of addresses, and start another."""
        self._servers[index].send_signal(by)
        self._servers[index].wait(_KILL_LIMIT_S)
        self._servers[index] = self._start(index)

    def _start(self, index: int) -> psutil.Popen:
        port, metrics_port = self._ports[index], self._ports[index + 2]
        return start(
            self._bundle,
            *self._options,
            port=port,
            metrics_port=metrics_port,
            environment=self._environment,
            output=_log(self._logs, str(index)),
        )


class Ray:
    """Two replicas on Ray Serve, behind HAProxy; Ray starts others in their place."""

    def __init__(self, bundle: Path, store: Store, logs: Path | None = None) -> None:
        self._bundle = bundle
        self._logs = logs
        self._options = [*_options(store), "--replicas", "2"]
        self._environment = {**store.environment, **new_snapshot_key()}
        self._port, self._metrics_port = free_ports(2)
        self._server: psutil.Popen | None = None

    @property
    def addresses(self) -> list[str]:
        """HAProxy's."""
        return [f"127.0.0.1:{self._port}"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start Ray and all it starts, and end all of it."""
        self._server = start(
            self._bundle,
            *self._options,
            port=self._port,
            metrics_port=self._metrics_port,
            environment=self._environment,
            output=_log(self._logs, "ray"),
        )
        try:
            yield
        finally:
            family = self._server.children(recursive=True)
            self._server.terminate()
            until = time.monotonic() + _STOP_LIMIT_S
            try:
                self._server.wait(_STOP_LIMIT_S)
            except psutil.TimeoutExpired:
                self._server.kill()
            # psutil.wait_procs may raise for one that is not our child and ends just then.
            while any(map(_runs, family)) and time.monotonic() < until:
                time.sleep(0.1)
            for process in filter(_runs, family):
                process.kill()

    def is_healthy(self) -> bool:
        """Whether there are two replicas, and the port answers."""
        return len(self._replicas()) == 2 and is_serving(self.addresses[0])

    def kill(self, rng: random.Random, both: bool) -> None:
        """Kill one replica, or both."""
        replicas = self._replicas()
        for process in replicas if both else [rng.choice(replicas)]:
            process.send_signal(signal.SIGKILL)

    def _replicas(self) -> list[psutil.Process]:
        assert self._server is not None
        found = []
        for process in self._server.children(recursive=True):
            try:
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found


Cluster = Processes | Ray


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _log(folder: Path | None, name: str) -> Path | None:
    return folder and folder / f"server-{name}.log"


def _options(store: Store) -> list[str]:
    snapshots = ["--snapshots", store.uri, "--snapshot-interval", "128"]
    optional = ["--snapshots-optional"] if store.fails else []
    return [*snapshots, *optional, "--threads", "1", "--slots", "64", "--drain-seconds", "1"]
