"""Selection scores: `reference` (loops, the oracle of every scorer).

`cpp_impl`: all that a window sees, in one pass on a CPU. `triton_impl`: window scores on a GPU.
"""
