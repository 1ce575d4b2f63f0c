"""Selection scores: `reference` (loops, the oracle of every scorer) and `triton_impl` (window scores on a GPU)."""
