"""Addresses, and the proxies before them."""

from __future__ import annotations

import pytest

from concertina.addresses import host_of, is_loopback, join, proxy_before, reachable


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:9000"),
        ("::1", "[::1]:9000"),
        ("fe80::1%eth0", "[fe80::1%eth0]:9000"),
        ("example.org", "example.org:9000"),
    ],
)
def test_host_and_port_are_an_address_and_back(host: str, address: str) -> None:
    assert join(host, 9000) == address
    assert host_of(address) == host


@pytest.mark.parametrize("address", ["::1", "[::1]", "[::1]:1", "localhost", "127.0.0.9:1"])
def test_loopback_has_many_names(address: str) -> None:
    assert is_loopback(host_of(address))


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "", "localhost.example.org", "::2"])
def test_what_is_elsewhere_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_where_a_server_listens_everywhere_it_is_reached_at_home() -> None:
    hosts = ("0.0.0.0", "::", "10.0.0.1")
    assert [reachable(host) for host in hosts] == ["127.0.0.1", "::1", "10.0.0.1"]


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, ""),
        ({"http_proxy": "http://user:secret@p:3128"}, "p:3128 (http_proxy)"),
        ({"http_proxy": "http://p:1", "https_proxy": "http://q:2"}, "q:2 (https_proxy)"),
        ({"http_proxy": "http://p:1", "grpc_proxy": "http://[::2]:3"}, "[::2]:3 (grpc_proxy)"),
        ({"http_proxy": "http://p:1", "no_proxy": "other, example.org"}, ""),
        ({"http_proxy": "http://p:1", "no_proxy": ".org"}, ""),
        ({"http_proxy": "http://p:1", "no_proxy": "ample.org"}, "p:1 (http_proxy)"),
        ({"http_proxy": "p"}, "an address that is none (http_proxy)"),
        ({"HTTP_PROXY": "http://p:1"}, ""),  # gRPC does not look at it
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(environment: dict[str, str], proxy: str) -> None:
    assert proxy_before("models.example.org:9000", environment) == proxy
    assert proxy_before("127.0.0.1:9000", environment) == ""


def test_a_network_may_be_exempt() -> None:
    environment = {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}
    assert proxy_before("10.1.2.3:9000", environment) == ""
    assert proxy_before("11.1.2.3:9000", environment) == "p:1 (http_proxy)"
