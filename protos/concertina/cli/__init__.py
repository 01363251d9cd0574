"""The command `concertina`."""
