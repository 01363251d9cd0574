"""Bundles on disk, verified, and the arithmetic of their state."""
