"""Who does the clients' work: the same steps, whichever processes take them. loop.py is common to all.

To the same bits, but for "stacked", which trains clients side by side and adds in another order.
"""

ENGINES = ("serial", "pool", "stacked", "flower", "torchrun")
