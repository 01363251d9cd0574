"""Certificates for a day: of an authority that tests trust, and of one they do not."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.config import TlsConfig

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """Issues certificates for 127.0.0.1, as files in one folder."""

    folder: Path
    name: x509.Name
    key: ec.EllipticCurvePrivateKey

    @property
    def file(self) -> Path:
        """Its own certificate."""
        return self.folder / "authority.pem"

    def issue(self, name: str, days: int = 1) -> tuple[Path, Path]:
        """Files of a certificate and of its key. Of no days, it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert, secret = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        signed = _sign(_name(name), key, self.name, self.key, days=days)
        cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert, secret


def new_authority(folder: Path) -> Authority:
    """An authority that nobody knows yet."""
    folder.mkdir(parents=True)
    key, name = ec.generate_private_key(ec.SECP256R1()), _name(folder.name)
    authority = Authority(folder, name, key)
    own = _sign(name, key, name, key, is_authority=True)
    authority.file.write_bytes(own.public_bytes(serialization.Encoding.PEM))
    return authority


@dataclass(frozen=True)
class Certificates:
    """What a server has, what callers have, and what strangers have."""

    trusted: Authority
    strange: Authority

    def server(self, mutual: bool = False) -> TlsConfig:
        """A server's files; with `mutual` it asks callers for a certificate."""
        return TlsConfig(*self.trusted.issue("server"), self.trusted.file if mutual else None)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    days: int = 1,
    is_authority: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + days * _DAY - datetime.timedelta(seconds=1))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
