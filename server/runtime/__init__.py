"""Runs the bundle's graphs with onnxruntime, over rows of state that are changed in place.

No other package of the server imports onnxruntime.
"""

from __future__ import annotations

import os

# Before onnxruntime is imported: it writes to ~/.cache/Microsoft and sends what it finds out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
