"""What is driven, and over which protocol."""
