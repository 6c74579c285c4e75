"""Triton kernels, one file an op, found by its name. Importing one imports Triton; nothing but qupedkern.backends.triton does."""
