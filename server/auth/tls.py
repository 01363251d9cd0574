"""TLS at the gRPC port of `--local`. On Ray Serve, HAProxy does it: see `server.hosts.haproxy`."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from server.auth.file_stamp import stamp
from server.config import ConfigError, TlsConfig

_log = logging.getLogger(__name__)


def tls_config(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsConfig | None:
    """The files that options name; None if they name none. Raises ConfigError for half of them."""
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    return TlsConfig(cert.resolve(), key.resolve(), client_ca and client_ca.resolve())


def require_usable(tls: TlsConfig) -> None:
    """Raise ConfigError, which names the files, if a server cannot use them."""
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(f"certificate {tls.cert} with key {tls.key}: {_reason(error)}") from None
    if tls.client_ca is None:
        return
    try:
        context.load_verify_locations(tls.client_ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"CA certificate {tls.client_ca}: {_reason(error)}") from None


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Server credentials that read the files again when they change.

    If that fails, the old certificates stay in use. Raises ConfigError.
    """
    seen = stamp(*tls.files)
    require_usable(tls)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        if (now := stamp(*tls.files)) == seen:
            return None
        seen = now
        try:
            require_usable(tls)
        except ConfigError as error:
            _log.error("keeping the old certificates: %s", error)
            return None
        _log.info("read the certificate %s", tls.cert)
        return _certificates(tls)

    return grpc.dynamic_ssl_server_credentials(
        _certificates(tls),
        renewed,  # type: ignore[arg-type]  # may return None: no change
        require_client_authentication=tls.client_ca is not None,
    )


def _certificates(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    authority = None if tls.client_ca is None else tls.client_ca.read_bytes()
    pair = (tls.key.read_bytes(), tls.cert.read_bytes())
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
