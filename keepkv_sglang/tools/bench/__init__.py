"""`keepkv bench`: workloads over HTTP against servers that it starts one after the other (docs/bench.md)."""
