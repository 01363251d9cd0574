"""Bundles: reading and verifying them, and computing the size of their state."""
