"""Models for the demo, tests and measurements: catalogue.py has the names, cache.py makes their folders."""
