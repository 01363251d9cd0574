"""Runs the bundle's graphs with onnxruntime, over rows of state that are changed in place.

No other package of the server imports onnxruntime.
"""
