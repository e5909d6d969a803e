"""Where the keys are: placed on unlabelled features by a moving average or k-means, and fixed from then on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.index import nearest

EPSILON = 1e-5  # Laplace smoothing of the masses, as published


@dataclass
class KeyAverages:
    """Keys as moving averages of the queries that are nearest to them.

    Attributes:
        keys: (C, K, k).
        sums: (C, K, k), m: moving average of the sum of queries per batch.
        masses: (C, K), N: moving average of their number.
    """

    keys: Tensor
    sums: Tensor
    masses: Tensor

    @torch.no_grad()
    def step(self, queries: Tensor, decay: float) -> Tensor:
        """One batch: assign to the old keys, then move them.

        ``N <- g N + (1 - g) n``, ``m <- g m + (1 - g) s``, ``K_j = m_j / N'_j`` with
        ``N'_j = (N_j + e) / (sum N + K e) * sum N``.

        Args:
            queries: (B, C, k).
            decay: g.

        Returns:
            int64 (B, C), the nearest old keys.
        """
        heads, pairs, width = self.keys.shape
        index: Tensor = nearest(queries, self.keys).squeeze(2).long()
        slots = (index + torch.arange(heads, device=index.device) * pairs).flatten()
        hits = torch.bincount(slots, minlength=heads * pairs).view(heads, pairs)
        sums = torch.zeros(heads * pairs, width, device=slots.device, dtype=queries.dtype)
        sums.index_add_(0, slots, queries.reshape(-1, width))
        self.masses.mul_(decay).add_(hits, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums.view_as(self.sums), alpha=1 - decay)
        total = self.masses.sum(dim=1, keepdim=True)
        smoothed = (self.masses + EPSILON) / (total + pairs * EPSILON) * total
        torch.div(self.sums, smoothed.unsqueeze(2), out=self.keys)
        return index

    @torch.no_grad()
    def replace_dead(self, queries: Tensor, threshold: float, generator: torch.Generator) -> None:
        """Give keys with less mass than ``threshold`` a new place: a query of this batch, each at most once a head.

        Its averages start anew as well: the mass of a fair share, B / K, all of it at the new place. Where more keys
        are dead than there are queries, those with the least mass go first and the rest wait for the next batch.

        Args:
            queries: (B, C, k) of the batch that was just averaged.
            threshold: theta.
            generator: draws the queries.
        """
        dead = self.masses < threshold
        if not dead.any():
            return
        batch, heads, _ = queries.shape
        pairs = self.keys.shape[1]
        draws = torch.rand(heads, batch, generator=generator).argsort(dim=1).to(queries.device)
        order = self.masses.masked_fill(~dead, torch.inf).argsort(dim=1, stable=True)  # dead keys first
        count = min(batch, pairs)
        chosen = order[:, :count]
        rows = torch.arange(heads, device=queries.device).unsqueeze(1)
        place = queries[draws[:, :count], rows]  # (C, count, k)
        now = dead.gather(1, chosen)
        mass = batch / pairs
        self.keys[rows, chosen] = torch.where(now.unsqueeze(2), place, self.keys[rows, chosen])
        self.sums[rows, chosen] = torch.where(now.unsqueeze(2), place * mass, self.sums[rows, chosen])
        self.masses[rows, chosen] = torch.where(now, mass, self.masses[rows, chosen])

    @torch.no_grad()
    def overwrite_dead(self, queries: Tensor, threshold: float, draws: Tensor) -> Tensor:
        """The published replacement: ``draws`` (C, K) rows of the batch, repetition allowed; the averages stay.

        Returns:
            bool (C, K), the keys that were dead.
        """
        dead = self.masses < threshold
        heads = torch.arange(len(draws), device=queries.device).unsqueeze(1)
        self.keys = torch.where(dead.unsqueeze(2), queries[draws, heads], self.keys)
        return dead


def start_normal(queries: Tensor, pairs: int, generator: torch.Generator) -> KeyAverages:
    """The published start: normal keys, their sums at the keys although no mass stands behind them."""
    _, heads, width = queries.shape
    keys = torch.randn(heads, pairs, width, generator=generator).to(queries)
    return KeyAverages(keys, keys.clone(), torch.zeros(heads, pairs, device=queries.device))


def start_sample(queries: Tensor, pairs: int, batch: int, generator: torch.Generator) -> KeyAverages:
    """Distinct queries (N, C, k) as keys, each with a fair share of mass; where N < K, the rest are normal draws.

    The draws have the mean and the standard deviation of the head's queries.
    """
    n, heads, width = queries.shape
    rows = torch.rand(heads, n, generator=generator).argsort(dim=1)[:, :pairs].to(queries.device)
    keys = queries[rows, torch.arange(heads, device=queries.device).unsqueeze(1)]
    if n < pairs:
        extra = torch.randn(heads, pairs - n, width, generator=generator).to(queries)
        spread = queries.std(dim=0, unbiased=False).unsqueeze(1)
        keys = torch.cat([keys, queries.mean(dim=0).unsqueeze(1) + spread * extra], dim=1)
    return with_masses(keys.contiguous(), torch.full((heads, pairs), batch / pairs, device=keys.device))


def with_masses(keys: Tensor, masses: Tensor) -> KeyAverages:
    """Keys with sums that agree with their masses, so that the next step moves them gently."""
    return KeyAverages(keys, keys * masses.unsqueeze(2), masses)


@torch.no_grad()
def lloyd(
    queries: Tensor, means: Tensor, rounds: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """K-means of every head.

    Args:
        queries: (N, C, k).
        means: (C, K, k), the start.
        rounds: at least 1.
        generator: moves empty clusters to distinct random queries before each further round; None leaves them.

    Returns:
        Means (C, K, k), and the sizes of the clusters in the last assignment, int64 (C, K).
    """
    heads, pairs, width = means.shape
    means = means.clone()
    sizes = torch.zeros(heads, pairs, dtype=torch.long, device=means.device)
    for step in range(rounds):
        if step and generator is not None:
            crowd = KeyAverages(means, means.clone(), sizes.to(means.dtype))
            crowd.replace_dead(queries, 0.5, generator)
        index = nearest(queries, means).squeeze(2).long()
        slots = (index + torch.arange(heads, device=index.device) * pairs).flatten()
        sizes = torch.bincount(slots, minlength=heads * pairs).view(heads, pairs)
        sums = torch.zeros(heads * pairs, width, device=means.device, dtype=means.dtype)
        sums.index_add_(0, slots, queries.reshape(-1, width))
        filled = sums.view_as(means) / sizes.clamp(min=1).unsqueeze(2)
        means = torch.where((sizes > 0).unsqueeze(2), filled, means)
    return means, sizes


def place_keys(queries: Tensor, config: DKVBConfig, generator: torch.Generator) -> Tensor:
    """Keys (C, K, k) from unlabelled queries (N, C, k), by the options ``key_*``."""
    n, pairs, batch = len(queries), config.pairs, min(config.key_batch, len(queries))
    if config.compat or config.key_start == "normal":
        averages = start_normal(queries, pairs, generator)
    else:
        averages = start_sample(queries, pairs, batch, generator)
        if config.key_start == "kmeans":
            means, sizes = lloyd(queries, averages.keys, config.key_rounds, generator)
            averages = with_masses(means, sizes * (batch / n))
    threshold = config.key_dead * batch / pairs
    for _ in range(config.key_passes):
        for part in torch.split(torch.randperm(n, generator=generator), batch):
            drawn = queries[part.to(queries.device)]
            averages.step(drawn, config.key_decay)
            if config.compat:
                rows = torch.randint(len(drawn), (config.heads, pairs), generator=generator)
                averages.overwrite_dead(drawn, threshold, rows.to(queries.device))
            else:
                averages.replace_dead(drawn, threshold, generator)
    return averages.keys
