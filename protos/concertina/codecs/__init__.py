"""What turns data into tokens and back, for whoever prepares, serves or sends it.

Needs the extra `codecs` (NumPy and Pillow).
"""
