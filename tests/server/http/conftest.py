"""A gateway to a real server of tiny models, and one to a server that says what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.concertina.conftest import Fake
from tests.concertina.conftest import fake as fake
from tests.server.http.gateways import Front, fronting, serving


@pytest.fixture(scope="module")
def front(text_bundle: Path, image_bundle: Path) -> Iterator[Front]:
    """A gateway to a server of `tiny-text` and `tiny-image`."""
    with serving(text_bundle, image_bundle) as upstream, fronting(upstream) as front:
        yield front


@pytest.fixture
def told(fake: Fake) -> Iterator[Front]:
    """A gateway to the server `fake`."""
    with fronting(fake.address, ping_seconds=0.2, slow_reader_seconds=2.0) as front:
        yield front
