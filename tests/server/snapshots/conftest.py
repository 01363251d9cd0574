"""Where snapshots can lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.server.snapshots.buckets import bucket_server


@pytest.fixture(params=["file", "memory", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where snapshots can lie."""
    if request.param == "s3":
        yield request.getfixturevalue("bucket")
    else:
        yield f"{request.param}://{tmp_path}/{uuid4().hex}"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket that is there as long as these tests."""
    with bucket_server() as uri:
        yield f"{uri}/{uuid4().hex}"
