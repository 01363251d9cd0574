"""The scripted server, for the examples, too."""

from __future__ import annotations

from tests.concertina.conftest import fake as fake
