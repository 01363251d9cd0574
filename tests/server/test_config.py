from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigError, EngineConfig, ServeConfig

BUNDLES = (Path("bundle"),)


def test_defaults_run_and_keep_to_loopback() -> None:
    config = ServeConfig(BUNDLES)
    assert config.address == "127.0.0.1:9000"
    assert config.engine == EngineConfig()


def test_the_address_of_a_port_that_is_open_to_the_network_is_local_too() -> None:
    assert ServeConfig(BUNDLES, host="0.0.0.0", port=1).address == "127.0.0.1:1"
    assert ServeConfig(BUNDLES, host="10.1.2.3", port=1).address == "10.1.2.3:1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"slots": 0}, "slots is 0: it must be from 1 to"),
        ({"queue_limit": -1}, "queue_limit is -1: it must be from 0 to"),
        ({"queue_tokens": 0}, "queue_tokens is 0: it must be from 1 to"),
        ({"state_limit_bytes": -1}, "state_limit_bytes is -1: it must be from 0 to"),
        ({"stream_buffer": 0}, "stream_buffer is 0"),
        ({"prefill_share": 0.0}, "prefill_share is 0.0"),
        ({"prefill_share": 1.5}, "prefill_share is 1.5: it must be from 0.01 to 0.95"),
        ({"prefill_share": float("nan")}, "prefill_share is nan"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0: it must be from 1 to"),
        ({"threads": -2}, "threads is -2"),
        ({"provider": "tpu"}, "provider is tpu: it must be cpu or cuda"),
    ],
)
def test_engine_settings_have_ranges(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bundles": ()}, "bundles is empty"),
        ({"host": ""}, "host is empty"),
        ({"port": 0}, "port is 0: it must be from 1 to 65535"),
        ({"port": 65536}, "port is 65536"),
        ({"metrics_port": -1}, "metrics_port is -1"),
        ({"port": 77, "metrics_port": 77}, "metrics_port is 77: it must differ from port"),
        ({"replicas": 0}, "replicas is 0"),
        ({"max_request_bytes": 10}, "max_request_bytes is 10"),
        ({"drain_seconds": -1}, "drain_seconds is -1"),
    ],
)
def test_serve_settings_have_ranges(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        ServeConfig(**{"bundles": BUNDLES, **settings})


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().slots = 3  # type: ignore[misc]
