"""What is answered: objects, and events."""
