"""What a server says when it is ready, and that the command it says works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.auth.api_keys import Caller, new_key, write_keys
from server.config import EngineConfig, ServeConfig
from server.hosts.greeting import greeting
from tests.certificates import Certificates
from tests.e2e.servers import ROOT, serving

CONFIG = ServeConfig((Path("bundle"),), port=9012, metrics_port=9013)


def named(name: str, source: str = "", template: object = None, writes_text: bool = True) -> Any:
    """As much of a bundle as a greeting needs."""
    manifest = SimpleNamespace(training_data=SimpleNamespace(source=source))
    codec = SimpleNamespace(writes_text=writes_text)
    return SimpleNamespace(name=name, manifest=manifest, codec=codec, chat_template=template)


TEXT, IMAGE = named("prose"), named("two words", writes_text=False)
WAIT = 60.0


def last(config: ServeConfig, bundle: Any = TEXT) -> str:
    return greeting(config, [bundle])[-1]


def test_where_it_listens_and_who_may_call() -> None:
    assert greeting(CONFIG, [TEXT]) == [
        "  gRPC     127.0.0.1:9012 (plaintext, for anyone who can reach it)",
        "  metrics  http://127.0.0.1:9013/metrics",
        'try: concertina generate "The " -m prose --address 127.0.0.1:9012',
    ]
    assert last(CONFIG, IMAGE).startswith("try: concertina paint -m 'two words' --address")
    assert greeting(replace(CONFIG, metrics_port=0), []) == [
        "  gRPC     127.0.0.1:9012 (plaintext, for anyone who can reach it)",
        "see: concertina models --address 127.0.0.1:9012",
    ]


def test_whoever_has_a_browser_is_told_of_the_page() -> None:
    assert "  page     http://127.0.0.1:9014/" in greeting(replace(CONFIG, http_port=9014), [TEXT])
    assert not [line for line in greeting(CONFIG, [TEXT]) if "page" in line]


def test_what_to_try_is_what_a_model_is_good_at() -> None:
    code = last(CONFIG, named("tiny", source="Python files of the standard library"))
    assert code.startswith('try: concertina generate "import " -m tiny')
    assert last(CONFIG, named("python-4k")) == code.replace("tiny", "python-4k")
    assert last(CONFIG, named("talks", template=object())).startswith("try: concertina chat -m ")
    templated = replace(CONFIG, engine=EngineConfig(chat_template="{{ messages }}"))
    assert last(templated).startswith("try: concertina chat -m prose")
    assert last(templated, IMAGE).startswith("try: concertina paint")


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("example.org", "example.org")],
)
def test_addresses_can_be_used_as_they_are_printed(host: str, address: str) -> None:
    grpc, metrics, command = greeting(replace(CONFIG, host=host), [TEXT])
    assert f" {address}:9012 " in grpc
    assert metrics.endswith(f" http://{address}:9013/metrics")
    assert command.split()[-1].strip("'") == f"{address}:9012"


def test_the_key_is_one_that_may_use_the_model(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    write_keys(file, [])
    config = replace(CONFIG, keys=file)
    *_, first, command = greeting(config, [TEXT])
    assert first == f"first: concertina keys add me --keys {file} --out me.key"
    assert command.endswith(" --key-file me.key")
    callers = (Caller("alice", ("verse",)), Caller("bob"))
    write_keys(file, [new_key(caller)[0] for caller in callers])
    assert last(config).endswith(" --key-file bob.key")
    assert greeting(config, [])[-1].endswith(" --key-file alice.key")


def test_the_address_is_one_that_the_certificate_is_for(certificates: Certificates) -> None:
    config = replace(CONFIG, tls=certificates.server())  # for 127.0.0.1
    for host in ("127.0.0.1", "0.0.0.0", "::"):
        command = last(replace(config, host=host))
        assert f" --address 127.0.0.1:9012 --ca {certificates.server().cert}" in command
    mutual = replace(config, tls=certificates.server(mutual=True))
    assert last(mutual).endswith(" --cert YOURS.pem --cert-key YOURS-key.pem")


@pytest.mark.e2e
def test_the_command_works_as_it_is_printed(
    certificates: Certificates, text_bundle: Path, tmp_path: Path
) -> None:
    program = tmp_path / "concertina"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m concertina.cli.main "$@"\n')
    program.chmod(0o700)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
        "COLUMNS": "500",
    }

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT,
        )

    assert shell("concertina keys add alice --out alice.key").returncode == 0
    assert (tmp_path / "alice.key").stat().st_mode & 0o777 == 0o600
    tls = certificates.server()
    options = ["--keys", str(tmp_path / "keys.json"), "--tls-cert", str(tls.cert), "--tls-key"]
    with serving(str(text_bundle), "--local", *options, str(tls.key)) as server:
        (line,) = re.findall("^try: (.*)$", server.output(), re.MULTILINE)
        tried = shell(f"{line} -n 5")
        assert (tried.returncode, tried.stderr) == (0, ""), tried.stderr
        assert tried.stdout
        refused = shell(line.partition(" --key-file")[0])
        assert refused.returncode == 1
        assert "--key-file" in refused.stderr
