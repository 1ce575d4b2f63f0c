"""Tables, statistics and plots of what the tools and benchmarks measure."""
