"""Streams become tokens: one thread per bundle that plans, steps, samples and folds."""
