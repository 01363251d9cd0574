"""The front door: OpenAI's HTTP API, as a client of the gRPC services."""
