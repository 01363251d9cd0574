"""Reads and writes the manifest of a bundle, and computes from it what a stream costs.

The arithmetic (`resources`) needs the extra `codecs`, for NumPy.
"""
