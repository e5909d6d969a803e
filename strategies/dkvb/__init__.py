"""Discrete key-value bottleneck: see README.md."""
