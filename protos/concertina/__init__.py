"""Concertina as callers see it: the contracts, a client, the command line, and what they share."""

__version__ = "0.1.0"
