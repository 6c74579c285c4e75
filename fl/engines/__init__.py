"""Who does the clients' work: the same steps, the same bits, whichever processes take them. loop.py is common to all."""

ENGINES = ("serial", "pool", "flower")
