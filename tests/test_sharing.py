"""Which tests run in one process."""

from __future__ import annotations

import pytest

from tests.sharing import group


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("tests/model/test_train.py::test_loss[full-1]", "tests/model/test_train.py"),
        ("tests/e2e/test_streams.py::test_text[ray]", "server ray"),
        ("tests/e2e/test_bad_input.py::test_bad[ray-unknown model]", "server ray"),
        ("tests/e2e/test_life.py::test_two_servers_do_not_meet", "server ray"),
        ("tests/e2e/test_life.py::test_without_haproxy[1-direct ingress]", "server ray"),
        ("tests/e2e/test_closed.py::test_a_certificate_is_not_a_key[local]", "server local"),
        ("tests/parity/test_streams.py::test_prefill[mixture-1]", "bundle mixture"),
        ("tests/parity/test_batches.py::test_rows", "tests/parity/test_batches.py"),
        ("tests/export/test_kernels.py::test_every_node[logsparse]", "half bundle logsparse"),
        (
            "tests/server/runtime/test_device_state.py::test_any[logsparse-0]",
            "half bundle logsparse",
        ),
    ],
)
def test_what_is_costly_is_made_once(nodeid: str, expected: str) -> None:
    assert group(nodeid) == expected
