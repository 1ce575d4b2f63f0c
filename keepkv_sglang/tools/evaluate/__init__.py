"""`keepkv eval`: quality of compression methods on real text, offline, with the compressor that the server runs.

probe (a model whose attention reads compressed rows) -> methods (ours, peers) -> tasks -> results -> report.
"""
