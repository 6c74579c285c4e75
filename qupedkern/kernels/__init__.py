"""Triton kernels, one file an op, found by its name. Importing one imports Triton; only qupedkern.backends.triton imports them.

_crossovers.py needs no Triton.
"""
