"""Generates the tokens of streams: one thread per bundle plans, steps, samples and folds."""
