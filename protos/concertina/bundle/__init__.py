"""The bundle as export writes and the server reads it: manifest, and what a stream costs."""
