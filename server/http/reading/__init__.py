"""What a body asks for."""
