"""What `serve` refuses before it starts anything."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from server.config import ConfigError, ServeConfig
from server.errors import BundleError
from server.hosts import serve as serve_module
from server.hosts.serve import serve
from server.ops.ports import PortTaken, free_ports

GIB = 1024**3


def test_a_tampered_bundle_names_the_file(image_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(image_bundle, bundle)
    content = bytearray((bundle / "fold.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "fold.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"fold\.onnx"):
        serve([image_bundle, bundle], local=True)


@pytest.mark.parametrize(("option", "other"), [("port", "metrics_port"), ("metrics_port", "port")])
def test_a_taken_port_names_the_option(option: str, other: str, image_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {option: taken.getsockname()[1], other: free_ports(1)[0]}
        with pytest.raises(PortTaken, match=f"--{option.replace('_', '-')}"):
            serve([image_bundle], local=True, **ports)


def test_a_port_of_http_that_is_named_has_to_be_free(image_bundle: Path) -> None:
    port, metrics_port = free_ports(2)
    ports = {"port": port, "metrics_port": metrics_port}
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(PortTaken, match="--http-port"),
    ):
        serve([image_bundle], local=True, http_port=taken.getsockname()[1], **ports)


@pytest.mark.parametrize("is_taken", [False, True])
def test_the_usual_port_of_http_is_used_if_it_is_free(
    is_taken: bool,
    image_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr("server.hosts.local.serve", lambda config, _: served.append(config))
    monkeypatch.setattr(serve_module, "interrupt_on_stop_signals", lambda: None)
    port, metrics_port, usual = free_ports(3)
    monkeypatch.setattr(serve_module, "HTTP_PORT", usual)
    with socket.create_server(("127.0.0.1", usual if is_taken else 0)):
        serve([image_bundle], local=True, port=port, metrics_port=metrics_port)
    assert served[0].http_port == (0 if is_taken else usual)
    assert (f"port {usual} is taken" in capsys.readouterr().out) is is_taken


def test_a_plaintext_port_is_for_tls_only(image_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="plain_port is 9001: it needs TLS"):
        serve([image_bundle], local=True, plain_port=9001)


def test_no_bundle_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="bundles holds no bundle"):
        serve(local=True)


def test_a_setting_out_of_range(image_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="slots is 0"):
        serve([image_bundle], slots=0, local=True)


def test_a_chat_template_is_read_before_anything_is_converted(tmp_path: Path) -> None:
    model, template = tmp_path / "model.gguf", tmp_path / "chat.jinja"
    model.touch()  # to convert it would fail in another way
    refused = {None: "cannot be read: No such file", b"{% for": "is no template", b"\xff": "utf-8"}
    for content, complaint in refused.items():
        if content is not None:
            template.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"--chat-template: .*chat\.jinja.*{complaint}"):
            serve([model], local=True, chat_template=template)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        serve([model], local=True, chat_template=tmp_path)


@pytest.mark.parametrize(
    ("options", "state_limit_bytes", "threads", "session_bytes"),
    [
        ({}, 3 * GIB, 2, 6 * GIB // 8),
        ({"replicas": 2}, 3 * GIB // 2, 1, 6 * GIB // 16),
        ({"replicas": 8}, 3 * GIB // 8, 1, 6 * GIB // 64),
        ({"state_limit_bytes": GIB, "threads": 5, "session_bytes": 0}, GIB, 5, 0),
    ],
    ids=str,
)
def test_defaults_are_those_of_the_container(
    options: dict[str, int],
    state_limit_bytes: int,
    threads: int,
    session_bytes: int,
    image_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr(serve_module, "memory_bytes", lambda: 6 * GIB)
    monkeypatch.setattr("concertina.machine.memory_bytes", lambda _: 6 * GIB)
    monkeypatch.setattr(serve_module, "cores", lambda: 2)
    monkeypatch.setattr(serve_module, "cores_if_fewer", lambda: 2)
    monkeypatch.setattr("server.hosts.local.serve", lambda config, _: served.append(config))
    monkeypatch.setattr(serve_module, "interrupt_on_stop_signals", lambda: None)
    port, metrics_port = free_ports(2)
    ports = {"port": port, "metrics_port": metrics_port, "http_port": 0}
    serve([image_bundle], local=True, **ports, **options)
    (config,) = served
    assert config.engine.state_limit_bytes == state_limit_bytes
    assert config.engine.threads == threads
    assert config.engine.session_bytes == session_bytes
