"""Networks that grow where they lack expressivity [TINY] (theory §8)."""
