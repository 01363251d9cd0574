"""A server that is closed to strangers, by mTLS and by keys, in both homes."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from concertina.client import (
    AccessDenied,
    Client,
    ConcertinaError,
    Finished,
    Overloaded,
    ServerUnavailable,
    Tls,
)
from server.auth.api_keys import Caller, Key, new_key, write_keys
from tests.certificates import Certificates
from tests.e2e.servers import Server, concertina, serving, until

SOON = 20.0


@dataclass(frozen=True)
class Closed:
    """A server with a key and a certificate that it accepts."""

    server: Server
    keys: Path
    key: Key
    secret: str
    tls: Tls

    def client(self, secret: str | None, tls: Tls | None) -> Client:
        return Client(self.server.address, key=secret, tls=tls)


@pytest.fixture(scope="module", params=["ray", "local"])
def closed(
    request: pytest.FixtureRequest,
    image_bundle: Path,
    certificates: Certificates,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Closed]:
    key, secret = new_key(Caller("friend", max_streams=1))
    keys = tmp_path_factory.mktemp("closed") / "keys.json"
    write_keys(keys, [key])
    tls = certificates.server(mutual=True)
    assert tls.client_ca is not None
    files = ["--tls-cert", tls.cert, "--tls-key", tls.key, "--tls-client-ca", tls.client_ca]
    home = ["--local"] if request.param == "local" else []
    options = [*map(str, [image_bundle, "--keys", keys, *files]), "--threads", "1", *home]
    caller = Tls(certificates.trusted.file, *certificates.trusted.issue("friend"))
    with serving(*options, http=True) as server:
        yield Closed(server, keys, key, secret, caller)


def test_strangers_do_not_get_through_the_edge(closed: Closed, certificates: Certificates) -> None:
    trusted = certificates.trusted.file
    for tls in (
        None,
        Tls(),
        Tls(trusted),
        Tls(trusted, *certificates.strange.issue("stranger")),
        Tls(certificates.strange.file, closed.tls.cert, closed.tls.cert_key),
    ):
        with closed.client(closed.secret, tls) as client:
            with pytest.raises(ServerUnavailable) as raised:
                client.models(timeout=SOON)
            assert "no Concertina server answers" not in str(raised.value)


def test_a_certificate_is_not_a_key(closed: Closed) -> None:
    for secret in ("", "concertina-guess"):
        with closed.client(secret, closed.tls) as client:
            with pytest.raises(AccessDenied):
                client.models(timeout=SOON)
            with pytest.raises(AccessDenied):
                list(client.generate(timeout=SOON))


def test_a_friend_is_served(closed: Closed) -> None:
    with closed.client(closed.secret, closed.tls) as client:
        assert [model.name for model in client.models(timeout=SOON)] == ["tiny-image"]
        assert isinstance(list(client.generate(timeout=SOON))[-1], Finished)
        with pytest.raises(ConcertinaError) as raised:
            list(client.generate(n=2, timeout=SOON))
        assert raised.value.code == "INVALID_ARGUMENT"
        assert not isinstance(raised.value, Overloaded)


def test_the_command_line_is_served(closed: Closed, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(closed.secret + "\n")
    files = {"ca": closed.tls.ca, "cert": closed.tls.cert, "cert-key": closed.tls.cert_key}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    options += ["--address", closed.server.address, "--key-file", str(tmp_path / "key")]
    process = concertina("models", "--json", *options, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert json.loads(output)["name"] == "tiny-image"


def test_health_needs_neither(closed: Closed) -> None:
    with urllib.request.urlopen(
        f"http://{closed.server.metrics_address}/healthz", timeout=10
    ) as ok:
        assert ok.status == 200


def _status(closed: Closed, tls: Tls, key: str) -> int:
    """What OpenAI's API answers; 0 if the connection is not accepted."""
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None and tls.cert_key is not None:
        context.load_cert_chain(tls.cert, tls.cert_key)
    host, _, port = closed.server.http_address.partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=60, context=context)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def test_the_http_api_is_closed_as_well(closed: Closed, certificates: Certificates) -> None:
    assert _status(closed, closed.tls, closed.secret) == 200
    assert _status(closed, closed.tls, "concertina-guess") == 401
    assert _status(closed, Tls(certificates.trusted.file), closed.secret) == 0
    stranger = Tls(certificates.trusted.file, *certificates.strange.issue("other"))
    assert _status(closed, stranger, closed.secret) == 0
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"http://{closed.server.http_address}/version", timeout=10)


def test_a_key_can_be_taken_away(closed: Closed) -> None:
    def models() -> int:
        try:
            return len(client.models(timeout=SOON))
        except AccessDenied:
            return 0

    with closed.client(closed.secret, closed.tls) as client:
        assert models() == 1
        write_keys(closed.keys, [])
        assert models() == 0
        write_keys(closed.keys, [closed.key])
        until(lambda: models() == 1)
