"""One server on Ray Serve and one without, and every test of this folder against both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from concertina.client import Client
from tests.e2e.servers import Server, serving
from tests.once import one_at_a_time
from tests.server.http.gateways import Front, fronting
from tests.server.http.gateways import serving as serving_here

SLOTS, QUEUE_LIMIT = 4, 16
CONTEXT = 32_768


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def long_bundle(tiny_bundles: Path) -> Path:
    """Folder of the bundle `long-text`: bytes, and a context that no test can exhaust in time."""
    from export.bundle import export_bundle
    from model.config import ModelConfig
    from model.data import DatasetInfo
    from tests.checkpoints import write_checkpoint

    folder = tiny_bundles / "long-text"
    info = DatasetInfo("text", 256, "noise", "CC0-1.0")
    config = ModelConfig(256, CONTEXT, width=16, layers=1, heads=2, mlp=16, span=64)
    with one_at_a_time(folder):
        if not folder.exists():
            checkpoint = write_checkpoint(folder.with_name("long-text-checkpoint"), config, info)
            export_bundle(checkpoint, folder, name="long-text")
    return folder


@pytest.fixture(scope="package", params=["ray", "local"])
def server(
    request: pytest.FixtureRequest, long_bundle: Path, image_bundle: Path
) -> Iterator[Server]:
    """A server of the bundles `long-text` and `tiny-image`, with 4 slots and 16 waiting each.

    It answers OpenAI's API, too.
    """
    home = ["--local"] if request.param == "local" else []
    limits = ["--slots", str(SLOTS), "--queue-limit", str(QUEUE_LIMIT), "--threads", "1"]
    bundles = [str(long_bundle), str(image_bundle)]
    with serving(*bundles, *limits, "--drain-seconds", "5", *home, http=True) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of it."""
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def front(text_bundle: Path, image_bundle: Path) -> Iterator[Front]:
    """A gateway to a server of `tiny-text` and `tiny-image`."""
    with serving_here(text_bundle, image_bundle) as upstream, fronting(upstream) as front:
        yield front


@pytest.fixture(scope="module")
def long_front(long_bundle: Path) -> Iterator[Front]:
    """A gateway to a server of `long-text`, which has a chat template."""
    with serving_here(long_bundle) as upstream, fronting(upstream) as front:
        yield front
