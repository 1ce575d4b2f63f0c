"""Compression of one layer: `reference` (the equations) and `torch_impl` (batched segment operations)."""
