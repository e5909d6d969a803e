"""Elastic weight consolidation: weights that earlier tasks were sensitive to are held where they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import StrategyConfig, opt
from clkit.errors import Problem
from clkit.loader import Pool
from clkit.modes import evaluating
from clkit.strategy import Capabilities, RunContext, Strategy, on_deepspeed
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch


@dataclass
class EWCConfig(StrategyConfig):
    """Options of elastic weight consolidation."""

    lam: float = opt(1000.0, "strength of the penalty; 0 = sequential fine-tuning", min=0)
    mode: str = opt(
        "online",
        "hold weights where the last task left them, with the sum of all Fisher matrices, or for each finished task "
        "where that task left them (separate)",
        choices=("online", "separate"),
    )
    decay: float = opt(1.0, "online: the old Fisher matrix is multiplied by this at each task", min=0, max=1)
    examples: int = opt(200, "examples of a task that its Fisher matrix is estimated on; 0 = all", min=0)
    labels: str = opt(
        "data",
        "labels of the Fisher matrix: the given ones (empirical), or drawn from the model",
        choices=("data", "model"),
    )


class EWC(Strategy):
    """Cross entropy plus ``lam / 2 * sum F (theta - theta*)^2`` over all trained weights (Kirkpatrick et al. 2017).

    F is the diagonal of the Fisher matrix of the log-likelihood *per target*, as the loss is: squared gradients of
    single examples, summed, over the number of targets (an answer of n tokens has n). They are of the log-likelihood
    alone, never of the penalty, in evaluation mode. ``online`` (Schwarz et al. 2018) keeps one centre; ``separate`` is
    the original with a quadratic per task. Quadratics add up to one, so both keep one F and one centre, however many
    tasks there were. The gradient is added once per optimiser step, exact under micro-batches.
    """

    config_class = EWCConfig
    capabilities = Capabilities(causal=True, **on_deepspeed())

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """The Fisher matrix and its centre."""
        return 8 * sizes["trainable"]

    @classmethod
    def check(cls, config: EWCConfig) -> list[Problem]:
        """Only `online` forgets."""
        if config.mode == "separate" and config.decay != EWCConfig.decay:
            return [
                Problem("strategy.decay", "with mode=separate every task counts in full; drop it, or take mode=online")
            ]
        return []

    def setup(self, run: RunContext) -> None:
        """Find the weights; none is held yet."""
        super().setup(run)
        self._weights: dict[str, nn.Parameter] = {
            n: p for n, p in run.model.module.named_parameters() if p.requires_grad
        }
        self.fisher: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}
        self._constant = 0.0

    # --- the penalty ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def after_backward(self) -> None:
        """Add ``lam F (theta - centre)``, and log the penalty."""
        if not self.fisher or not self.config.lam:
            return
        done = self.run.position.step + 1
        logged = done == 1 or done % self.run.config.tracking.log_every == 0
        total, engine = self._constant, self.run.engine
        with engine.gathered(list(self._weights.values())):
            for name, parameter in self._weights.items():
                gap = _exact(parameter) - self.centre[name]
                pull = self.fisher[name] * gap
                engine.add_gradient(parameter, pull.to(parameter.dtype), self.config.lam)
                if logged:
                    total += float((pull * gap).sum())
        if logged:
            self.run.log("penalty", self.config.lam / 2 * total)

    # --- between tasks ----------------------------------------------------------------------------------------------
    def end_task(self, task: Task) -> None:
        """Estimate the Fisher matrix where the weights are now, and add its quadratic."""
        with self.run.engine.gathered(list(self._weights.values())):
            self._hold()

    def _hold(self) -> None:
        new = self.estimate()
        here = {name: _exact(p).clone() for name, p in self._weights.items()}
        if not self.fisher:
            self.fisher, self.centre = new, here
        elif self.config.mode == "online":
            self.fisher = {name: self.config.decay * old + new[name] for name, old in self.fisher.items()}
            self.centre = here
        else:
            self._add_quadratic(new, here)

    def _add_quadratic(self, new: dict[str, Tensor], here: dict[str, Tensor]) -> None:
        """F (x - c)^2 + G (x - d)^2 = (F + G) (x - e)^2 + F G / (F + G) (c - d)^2, e the weighted mean of c and d."""
        for name, old in self.fisher.items():
            total = old + new[name]
            share = torch.where(total > 0, new[name] / total, 0)
            gap = here[name] - self.centre[name]
            self._constant += float((old * share * gap.square()).sum())
            self.fisher[name] = total
            self.centre[name] += share * gap

    def estimate(self) -> dict[str, Tensor]:
        """The diagonal of the Fisher matrix of the current task, by name of the weight."""
        pool = Pool([self.run.encodings.train(i) for i in self.training_set(self.run.position.stage)])
        order = torch.randperm(len(pool), generator=self.run.streams["fisher examples"])
        weights = list(self._weights.values())
        sums = [torch.zeros_like(_exact(p)) for p in weights]
        targets = 0
        with evaluating(self.run.model.module):
            for i in order[: self.config.examples or len(pool)]:
                batch = pool.batch(i[None]).to(self.run.engine.device)
                targets += batch.num_targets
                gradients = torch.autograd.grad(self._log_likelihood(batch), weights, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += _exact(gradient).square()
        return {name: total / max(targets, 1) for name, total in zip(self._weights, sums, strict=True)}

    def _log_likelihood(self, batch: Batch) -> Tensor:
        """The sum over the targets of one example."""
        with self.run.engine.autocast():
            logits = self.run.model.logits(batch)
        labels = self.run.model.targets(batch).flatten()
        kept = labels != -100
        logits, labels = logits.flatten(0, -2)[kept], labels[kept]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.labels == "model":
            chances = logits.detach().softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=self.run.streams["fisher labels"])[:, 0].to(labels.device)
        return -F.cross_entropy(logits, labels, reduction="sum")

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The buffer and the quadratic."""
        quadratic = {"fisher": self.fisher, "centre": self.centre, "constant": self._constant}
        return {**super().state_dict(), **quadratic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        device = self.run.engine.device
        self.fisher = {name: value.to(device) for name, value in state["fisher"].items()}
        self.centre = {name: value.to(device) for name, value in state["centre"].items()}
        self._constant = state["constant"]


def _exact(x: Tensor) -> Tensor:
    """Without gradient, in float32 or, if it is that, float64: products with small F are lost in half precision."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
