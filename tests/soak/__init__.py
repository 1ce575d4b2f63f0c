"""A live server under random load, with faults: `python -m tests.soak --help`, `make soak-load`.

It stands with the tests and not with the tools: it injects faults into the server that it starts, pauses it, flushes
its cache and replaces its weights. What an operator may run against a server in use is `keepkv verify`.
"""
