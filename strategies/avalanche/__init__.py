"""Avalanche's plug-ins as strategies."""
