"""What several folders of tests share: tiny bundles, what runs when, how hypothesis looks about."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

from tests.pairs import thin_out

if TYPE_CHECKING:
    from tests.certificates import Certificates
    from tests.sharing import ByWhatIsShared

# The same examples everywhere, and no verdict that depends on how busy a machine is.
settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.register_profile(
    "first", settings.get_profile("steady"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# Before onnxruntime is imported, by whomever.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where these are set, help pages are coloured, and onnxruntime turns its telemetry off by itself.
for name in ("CI", "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE"):
    os.environ.pop(name, None)

# Started in the background, a shell's children ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Side by side, test processes lose more to each other's threads than they win by their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    thin_out(items, left_out=("slow", "chaos", "gpu", "clients"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are processors, since tests also wait; eight at most."""
    return min(8, 1 + (os.cpu_count() or 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByWhatIsShared:
    from tests.sharing import ByWhatIsShared

    return ByWhatIsShared(config, log)


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bundles are exported to, once for all processes of a test run.

    With TINY_BUNDLES they are kept from run to run.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return Path(os.environ.get("TINY_BUNDLES") or shared / "tiny-bundles")


@pytest.fixture(scope="session")
def text_bundle(tiny_bundles: Path) -> Path:
    """Folder of the bundle `tiny-text`: bytes, context 96, span 8."""
    from tests.bundles import make_text_bundle

    return make_text_bundle(tiny_bundles / "tiny-text")


@pytest.fixture(scope="session")
def image_bundle(tiny_bundles: Path) -> Path:
    """Folder of the bundle `tiny-image`: 8x8 pixels, 16 colours, three labels, span 8."""
    from tests.bundles import make_image_bundle

    return make_image_bundle(tiny_bundles / "tiny-image")


@pytest.fixture(scope="session")
def fixed_bundle(tiny_bundles: Path) -> Path:
    """Folder of the bundle `tiny-fixed`: the smallest that folds; negative queries, labels."""
    from tests.checkpoints import export_tiny

    return export_tiny(tiny_bundles, "fixed")


@pytest.fixture(scope="session")
def full_bundle(tiny_bundles: Path) -> Path:
    """Folder of the bundle `tiny-full`: full attention, which never folds."""
    from tests.checkpoints import export_tiny

    return export_tiny(tiny_bundles, "full")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates for 127.0.0.1."""
    from tests.certificates import Certificates, new_authority

    folder = tmp_path_factory.mktemp("certificates")
    return Certificates(new_authority(folder / "trusted"), new_authority(folder / "strange"))
