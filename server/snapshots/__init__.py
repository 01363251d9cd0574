"""Snapshots: streams encoded as bytes, sealed, and stored behind a URI."""
