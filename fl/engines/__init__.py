"""Engines run the rounds of a federation; they know checkpoints and clocks, and nothing of any algorithm's inside."""
