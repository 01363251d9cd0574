"""Bundles, as the export writes and the server reads them: manifest, and cost of a stream."""
