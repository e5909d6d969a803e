"""Groups of processes: the little that evaluation and logging need to know about the others."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Group(Protocol):
    """The processes of one run."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world(self) -> int:
        """How many processes there are."""

    def all_gather(self, obj: Any) -> list[Any]:
        """``obj`` of every process, in the order of ranks; JSON only, tuples come back as lists."""


class LocalGroup:
    """One process alone."""

    rank = 0
    world = 1

    def all_gather(self, obj: Any) -> list[Any]:
        """``[obj]``, after the same journey through JSON that it makes among many processes."""
        return [json.loads(json.dumps(obj))]


class TorchGroup:
    """The processes of an initialised ``torch.distributed`` job.

    Objects travel as JSON in byte tensors: torch's own ``all_gather_object`` would pickle them.

    Args:
        device: where the byte tensors live; NCCL needs this process's GPU, gloo the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def all_gather(self, obj: Any) -> list[Any]:
        """``obj`` of every process; every process must call this."""
        data = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(data)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size)
        counts = [int(s) for s in sizes]
        padded = data.new_zeros(max(counts))
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return [json.loads(part[:n].cpu().numpy().tobytes()) for part, n in zip(parts, counts, strict=True)]


def local_group() -> Group:
    """The group of a process that is alone."""
    return LocalGroup()
