"""Sets of runs that belong in one table: methods x seeds under one budget, `python -m fl paper SET`.

study.py reads a set, cells.py runs its cells, rows.py turns what they left into rows, text.py and picture.py show these,
command.py is the command line. The sets are fl/configs/paper/*.toml.
"""
