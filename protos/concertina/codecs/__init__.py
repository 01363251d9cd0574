"""Turns data into tokens and back, the same way in data preparation, server and command line.

Needs the extra `codecs` (Jinja, NumPy, Pillow and tokenizers).
"""
