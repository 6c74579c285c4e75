"""Programs that show the library on models it did not train. Each runs by itself: python examples/NAME.py."""
