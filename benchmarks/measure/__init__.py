"""How a case is measured: correctness first, then time in turns, memory, and what fits."""
