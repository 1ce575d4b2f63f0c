"""Compression mathematics of one layer: `reference` (the equations) and `torch_impl` (batched segment ops)."""
