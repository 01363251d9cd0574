"""The gRPC services: they check requests, fill in defaults and make response messages."""
