"""The side of Concertina that callers use: contracts, client, command line, and shared code."""

__version__ = "0.1.0"
