"""How training memory and the state of a stream grow with length."""
