"""The gRPC services: requests are checked and filled in, answers become messages."""
