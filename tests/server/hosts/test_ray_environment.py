from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.config import MEBIBYTE, ConfigError, ServeConfig
from server.hosts import ray_environment as environment
from server.hosts.ray_environment import DIRECT, GRPC_HOST, HAPROXY, PORTS, PYTHON_PROXY, data_path
from tests.certificates import Certificates

CONFIG = ServeConfig((Path("bundle"),), port=9012)


@pytest.fixture(params=[True, False], ids=["haproxy", "no haproxy"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Ray would find an HAProxy."""
    found: bool = request.param
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.setattr(environment, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    return found


def test_the_data_path(installed: bool, tmp_path: Path) -> None:
    one = environment.ray_environment(CONFIG, tmp_path)
    two = environment.ray_environment(ServeConfig(CONFIG.bundles, replicas=2), tmp_path)
    assert data_path(one) == (HAPROXY if installed else DIRECT)
    assert data_path(two) == (HAPROXY if installed else PYTHON_PROXY)


def test_haproxy_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    values = environment.ray_environment(CONFIG, tmp_path)
    assert data_path(values) == DIRECT
    assert values["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"] == "9012"


def test_a_replica_listens_where_it_has_to(installed: bool, tmp_path: Path) -> None:
    """On loopback behind HAProxy, for any host; else on the address that callers connect to."""
    config = ServeConfig(CONFIG.bundles, host="0.0.0.0")
    host = environment.ray_environment(config, tmp_path)[GRPC_HOST]
    assert host == ("127.0.0.1" if installed else "0.0.0.0")


def test_servers_on_one_machine_are_independent(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    one, other = (
        environment.ray_environment(CONFIG, here),
        environment.ray_environment(CONFIG, there),
    )
    assert len({one[port] for port in PORTS}) == len(PORTS)
    paths = [name for name, value in one.items() if value.startswith(str(here))]
    assert len(paths) == 6
    for name in (*paths, "RAY_AUTH_TOKEN"):
        assert one[name] != other[name]


def test_tls_is_at_the_public_port_and_plaintext_on_loopback(
    certificates: Certificates, tmp_path: Path
) -> None:
    config = replace(CONFIG, host="0.0.0.0", tls=certificates.server())
    values = environment.ray_environment(config, tmp_path)
    plain = environment.plain_port(config, values)
    assert plain != config.port == environment.plain_port(CONFIG, {})
    config_file = (tmp_path / "tls.conf").read_text()
    assert (
        "bind 0.0.0.0:9012 ssl " in config_file
        and f"server plaintext 127.0.0.1:{plain}" in config_file
    )
    assert "verify required" not in config_file
    environment.ray_environment(replace(config, tls=certificates.server(mutual=True)), tmp_path)
    assert "verify required" in (tmp_path / "tls.conf").read_text()
    for file in ("certificate.pem", "haproxy"):
        assert (tmp_path / file).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("host", "bind"),
    [("127.0.0.1", "127.0.0.1:9012"), ("0.0.0.0", "0.0.0.0:9012"), ("::1", "[::1]:9012 v6only")],
)
def test_plaintext_is_at_the_public_port(host: str, bind: str, tmp_path: Path) -> None:
    environment.ray_environment(replace(CONFIG, host=host), tmp_path)
    assert f"{bind} proto h2" in (tmp_path / "haproxy").read_text()


def test_tls_needs_haproxy(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with pytest.raises(ConfigError, match="needs HAProxy"):
        environment.ray_environment(replace(CONFIG, tls=certificates.server()), tmp_path)


def test_messages_have_the_configured_size(tmp_path: Path) -> None:
    config = ServeConfig(CONFIG.bundles, max_request_bytes=3 * MEBIBYTE)
    values = environment.ray_environment(config, tmp_path)
    assert values["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] == str(16 * MEBIBYTE)
    assert values[environment.REQUEST_BYTES] == str(3 * MEBIBYTE)


def test_ray_knows_every_variable(installed: bool, tmp_path: Path) -> None:
    """They are internals of Ray: a new release that renames one ignores it without a message."""
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    source = (Path(ray.origin).parent / "serve/_private/constants.py").read_text()
    values = [*environment.ray_environment(CONFIG, tmp_path), environment.HAPROXY_PROGRAM]
    names = [name for name in values if name.startswith("RAY_SERVE_")]
    assert len(names) > 15
    assert [name for name in names if f'"{name}"' not in source] == []
