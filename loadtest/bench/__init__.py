"""Our engine beside others on one machine: the only part of the load tester that opens an engine.

Every measurement is a process of its own (`worker`), started one at a time by `run`.
"""

from __future__ import annotations

import os

# Before onnxruntime is imported: it writes to ~/.cache/Microsoft and sends what it finds out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
