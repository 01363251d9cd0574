"""What a server says when it is ready: where it listens, who may call, and a command to try."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from concertina.addresses import host_of, is_loopback, join, reachable
from server.auth.api_keys import read_keys
from server.bundles.bundle import Bundle
from server.config import ServeConfig, TlsConfig


def greeting(config: ServeConfig, bundles: Sequence[Bundle]) -> list[str]:
    """Lines for whoever has started the server. The last ones are to be copied to a shell."""
    lines = [f"  gRPC     {config.address} {_openness(config)}"]
    if config.http_port:
        scheme = "http" if config.tls is None else "https"
        front = join(reachable(config.host), config.http_port)
        lines.append(f"  OpenAI   {scheme}://{front}/v1")
        lines.append(f"  page     {scheme}://{front}/")
    if config.metrics_port:
        metrics = join(reachable(config.host), config.metrics_port)
        lines.append(f"  metrics  http://{metrics}/metrics")
    if not bundles:
        return [*lines, f"see: concertina models {' '.join(_access(config, ''))}"]
    first = bundles[0]
    command = f"concertina {_verb(config, first)} -m {shlex.quote(first.name)}"
    if config.keys is not None and not _key_for(config.keys, first.name):
        keys = shlex.quote(str(config.keys))
        lines.append(f"first: concertina keys add me --keys {keys} --out me.key")
    return [*lines, f"try: {command} {' '.join(_access(config, first.name))}"]


def _verb(config: ServeConfig, bundle: Bundle) -> str:
    """What to try with a bundle: a talk, a text that goes on as its own did, or a picture."""
    if not bundle.codec.writes_text:
        return "paint"
    if bundle.chat_template is not None or config.engine.chat_template:
        return "chat"
    learned = f"{bundle.name} {bundle.manifest.training_data.source}".lower()
    return f'generate "{"import" if "python" in learned else "The"} "'


def _openness(config: ServeConfig) -> str:
    """Who may call, and whether the connection is encrypted."""
    callers = "anyone who can reach it" if config.keys is None else "callers with a key"
    if config.tls is None:
        return f"(plaintext, for {callers})"
    return f"({'TLS' if config.tls.client_ca is None else 'mTLS'}, for {callers})"


def _access(config: ServeConfig, model: str) -> list[str]:
    """The options with which a caller on this machine gets in."""
    options = ["--address", shlex.quote(_certified_address(config))]
    if config.tls is not None:
        options += ["--ca", shlex.quote(str(config.tls.cert))]
        if config.tls.client_ca is not None:  # the server knows the authority, not who has one
            options += ["--cert", "YOURS.pem", "--cert-key", "YOURS-key.pem"]
    if config.keys is not None:
        name = _key_for(config.keys, model) or "me"
        options += ["--key-file", shlex.quote(f"{name}.key")]
    return options


def _key_for(keys: Path, model: str) -> str:
    """The first key that may use a model; empty if there is none."""
    callers = (key.caller for key in read_keys(keys))
    return next((caller.name for caller in callers if not model or caller.may_use(model)), "")


def _certified_address(config: ServeConfig) -> str:
    """The address by a name that the certificate is for, if there is one."""
    if config.tls is None:
        return config.address
    names, host = _names(config.tls), host_of(config.address)
    everywhere = host != config.host
    fitting = [host] if host in names else []
    if is_loopback(host):
        fitting += [name for name in names if name == "localhost"]
    if everywhere:
        fitting += [name for name in names if is_loopback(name)]
    fitting += [name for name in names if not (is_loopback(name) or "*" in name)]
    return join(fitting[0], config.port) if fitting else config.address


def _names(tls: TlsConfig) -> list[str]:
    """Host names and numbers of a certificate: names first."""
    certificate = x509.load_pem_x509_certificate(tls.cert.read_bytes())
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    numbers = map(str, extension.value.get_values_for_type(x509.IPAddress))
    return [*extension.value.get_values_for_type(x509.DNSName), *numbers]
