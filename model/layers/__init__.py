"""The parts of a decoder's layers, and the architecture that chooses among them."""
