"""What a kernel must agree with, for this project's tests and for kernels written elsewhere. Needs hypothesis.

strategies.py: valid and hostile arguments of every op.  tolerances.py: how far from the float64 reference a kernel may be,
derived.  harness.py: run an op on one backend and compare.  `python -m qupedkern.testing` does it for every op.
"""
