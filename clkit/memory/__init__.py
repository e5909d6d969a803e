"""Exemplar buffers: which records of earlier tasks are kept for rehearsal."""

from clkit.memory.base import Buffer, Ref, make_buffer

__all__ = ["Buffer", "Ref", "make_buffer"]
