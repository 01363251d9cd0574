"""Runs the command `concertina`. Needs the extra `cli` (typer, rich, and the codecs)."""
