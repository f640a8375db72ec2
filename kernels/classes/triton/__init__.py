"""Decoding with keys of several classes, on a GPU: launching, and the compiled forms that the gate goes through."""
