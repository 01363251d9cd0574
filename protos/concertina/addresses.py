"""Addresses of servers: made of host and port, and whether a proxy lies before them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

# What gRPC looks at, in its order.
_PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXIES: Final = ("no_grpc_proxy", "no_proxy")
_LOOPBACK_NAMES: Final = ("localhost", "ip6-localhost", "ip6-loopback")
_SCHEMES: Final = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def join(host: str, port: int) -> str:
    """Host and port as one address: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of an address, an IPv6 one without its brackets."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def has_port(address: str) -> bool:
    """Whether an address is HOST:PORT, an IPv6 host in brackets; or is of a scheme of gRPC's.

    gRPC takes one without a port for one of port 443.
    """
    if address.startswith(_SCHEMES):
        return True
    host, _, port = address.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    is_host = bool(host) and (in_brackets or ":" not in host)
    return is_host and port.isdecimal() and 0 < int(port[:6]) < 65536


def reachable(host: str) -> str:
    """A host by which this machine reaches a server that listens on `host`."""
    return _ANY.get(host, host)


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or number, is this machine."""
    if host.lower().rstrip(".") in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_before(address: str, environment: Mapping[str, str] | None = None) -> str:
    """The proxy by which gRPC goes to an address, and the variable that names it; "" for none.

    Nothing that a caller sends to this machine goes by way of a proxy.
    """
    given = os.environ if environment is None else environment
    host = host_of(address)
    variable = next((name for name in _PROXIES if given.get(name)), "")
    if not variable or is_loopback(host):
        return ""
    exempt = next((given[name] for name in _NO_PROXIES if given.get(name)), "")
    if any(_exempts(entry.strip(), host) for entry in exempt.split(",")):
        return ""
    url = urlsplit(given[variable])
    try:
        shown = url.hostname and (join(url.hostname, url.port) if url.port else url.hostname)
    except ValueError:
        shown = None
    return f"{shown or 'an address that is none'} ({variable})"


def _exempts(entry: str, host: str) -> bool:
    if not entry:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return entry == "*" or host == entry.lstrip(".") or host.endswith("." + entry.lstrip("."))
