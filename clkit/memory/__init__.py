"""Exemplar buffers: which records of earlier tasks are kept for rehearsal, and what they and the model may occupy."""

from clkit.memory.base import Buffer, Ref, make_buffer
from clkit.memory.budget import Budget, Footprint, bytes_per_exemplar, exemplar_equivalent
from clkit.memory.herding import HerdingBuffer, class_mean, herd

__all__ = [
    "Budget",
    "Buffer",
    "Footprint",
    "HerdingBuffer",
    "Ref",
    "bytes_per_exemplar",
    "class_mean",
    "exemplar_equivalent",
    "herd",
    "make_buffer",
]
