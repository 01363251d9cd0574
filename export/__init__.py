"""Turns a checkpoint into a bundle, with proof that both compute the same."""

from __future__ import annotations

import os

# Before onnxruntime is imported: it writes to ~/.cache/Microsoft and sends what it finds out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
