"""Streams as bytes that outlive this process: what is in them, sealed, behind a URI."""
