"""Who owns which stream, and who reads it."""
