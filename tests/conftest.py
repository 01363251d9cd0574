"""What several folders of tests share: two tiny bundles, and how hypothesis looks for examples."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.certificates import Certificates

# The same examples everywhere, and no verdict that depends on how busy a machine is.
settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")

# Started in the background, a shell's children ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bundle `tiny-text`: bytes, context 96, span 8."""
    from tests.bundles import make_text_bundle

    return make_text_bundle(tmp_path_factory.mktemp("bundles") / "tiny-text")


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bundle `tiny-image`: 8x8 pixels, 16 colours, three labels, span 8."""
    from tests.bundles import make_image_bundle

    return make_image_bundle(tmp_path_factory.mktemp("bundles") / "tiny-image")


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the next two are exported to; tests/mutants keeps them from run to run."""
    return Path(os.environ.get("TINY_BUNDLES") or tmp_path_factory.mktemp("bundles"))


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
