"""Measurements of qupedkern: accuracy tables and kernel timings. `python -m bench --help`."""
