"""Drives a server as its callers would, and reports what they get."""
