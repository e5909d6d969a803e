"""I-LoRA: a fast adapter learns with replay, a slow average of it anchors its hidden states and serves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import ReplayConfig, StrategyConfig, opt
from clkit.errors import ConfigError, Problem
from clkit.models.pieces import OutputLayer, summed_cross_entropy
from clkit.modes import evaluating
from clkit.strategies.ilora.consistency import find_decoder, showing, squared_gap
from clkit.strategy import Capabilities, Losses, RunContext, Strategy, on_deepspeed
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch, count_targets


@dataclass
class ILoRAConfig(StrategyConfig):
    """Options of I-LoRA."""

    replay: ReplayConfig = opt(lambda: ReplayConfig(size=500), "rehearsal buffer")
    slow: str = opt(
        "ema",
        "slow learner: running average of the fast one, copy from the end of the last task, or untrained base model",
        choices=("ema", "snapshot", "base"),
    )
    interpolation: float = opt(0.9, "ema: weight of the old slow value at each step", min=0, max=1)
    ramp: bool = opt(False, "ema: at most 1 - 1/(k+1) in step k, so that early values are forgotten sooner")
    consistency: str = opt(
        "mse", "distance of hidden states; hinge counts only where slow is larger", choices=("mse", "hinge")
    )
    gamma: float = opt(1.0, "weight of the consistency term; 0 = replay with an averaged adapter", min=0)
    layers: list[int] = opt([], "hidden states compared: k = output of block k (from 1), -1 = of the last; [] = all")
    serve: str = opt("slow", "which learner is evaluated and exported", choices=("slow", "fast"))
    compat: bool = opt(
        False, "the published code's numbers: interpolation 0.25, hinge, gamma 1, all layers, its scale of the loss"
    )


# Published: ILORA.py in which47/LLMCL (a9dae12). Its buffer of 500 is the default above; its ramp never acts, since
# 1 - 1/(k+1) >= 0.25 from the first step on.
_PUBLISHED: dict[str, Any] = {"interpolation": 0.25, "ramp": False, "consistency": "hinge", "gamma": 1.0, "layers": []}


def ema_weight(step: int, interpolation: float, ramp: bool) -> float:
    """Weight of the old slow value in optimiser step ``step`` (from 1).

    >>> [ema_weight(k, 0.7, True) for k in (1, 2, 3, 4)], ema_weight(1, 0.7, False)
    ([0.5, 0.6666666666666667, 0.7, 0.7], 0.7)
    """
    return min(1 - 1 / (step + 1), interpolation) if ramp else interpolation


@torch.no_grad()
def interpolate_(slow: dict[str, Tensor], fast: dict[str, nn.Parameter], weight: float) -> None:
    """slow <- weight * slow + (1 - weight) * fast, in place, in the type of ``slow``, each matrix by itself."""
    for name, value in slow.items():
        value.lerp_(fast[name].to(value.dtype), 1 - weight)


class ILoRA(Strategy):
    """Interpolation-based LoRA (Ren et al. 2024, arXiv 2402.18865); README.md has equations and deviations.

    The slow learner is a dictionary of float32 tensors named like the trained parameters; there is no second adapter.
    """

    config_class = ILoRAConfig
    capabilities = Capabilities(kinds=frozenset({"text"}), needs_lora=True, causal=True, **on_deepspeed())

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.compat:
            self.config = dataclasses.replace(self.config, **_PUBLISHED)
        self.slow: dict[str, Tensor] = {}
        self._fast: dict[str, nn.Parameter] = {}
        self._layers: list[int] = []
        self._output: OutputLayer | None = None

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """The slow learner."""
        return 4 * sizes["trainable"]

    @classmethod
    def check(cls, config: ILoRAConfig) -> list[Problem]:
        """Replay is part of the method, an untrained model is nothing to serve, and `compat` fixes its options."""
        problems = []
        if config.replay.size == 0:
            problems.append(Problem("strategy.replay.size", "out of range (got 0, expected >= 1: I-LoRA rehearses)"))
        if config.slow == "base" and config.serve == "slow":
            problems.append(
                Problem("strategy.serve", "with slow=base the slow learner is the untrained model; set serve=fast")
            )
        if config.compat:
            default = ILoRAConfig()
            for name, published in _PUBLISHED.items():
                value = getattr(config, name)
                if value not in (getattr(default, name), published):
                    problems.append(
                        Problem(f"strategy.{name}", f"got {value}, but compat=true stands for {published}; drop one")
                    )
        return problems

    def setup(self, run: RunContext) -> None:
        """Copy the adapter, find the hidden states; also the last place to refuse what does not fit together.

        Raises:
            ConfigError: the buffer can't fill the replayed part of one batch, or a layer does not exist.
            CapabilityError: the model's decoder layers can't be found.
        """
        super().setup(run)
        batch = round(run.config.train.batch_size * self.config.replay.ratio)
        if self.config.replay.size < batch:
            raise ConfigError(
                f"strategy.replay.size: got {self.config.replay.size}, expected at least {batch} "
                "(train.batch_size * strategy.replay.ratio, the replayed part of one batch)"
            )
        self._fast = {name: p for name, p in run.model.module.named_parameters() if name in self._trained}
        with run.engine.gathered(list(self._fast.values())):
            self.slow = {
                name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in self._fast.items()
            }
        if self.config.gamma:
            self._layers = self._chosen_layers(len(find_decoder(run.model.module)[1]))
            half = getattr(run.model, "autocast_dtype", None) is torch.float16  # unscaled gradients would vanish
            self._output = None if half else OutputLayer.of(run.model.module)

    def _chosen_layers(self, count: int) -> list[int]:
        if not self.config.layers:
            return list(range(0 if self.config.compat else 1, count + 1))
        wrong = [k for k in self.config.layers if not 1 <= abs(k) <= count]
        if wrong:
            raise ConfigError(f"strategy.layers: got {wrong}, expected 1 to {count}, or -1 (the last) to -{count}")
        return sorted({k if k > 0 else k + count + 1 for k in self.config.layers})

    # --- loss -------------------------------------------------------------------------------------------------------
    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of new and replayed rows in one joint pass; gamma * consistency on the replayed rows."""
        rows = batch.replayed
        if rows is None or not self.config.gamma or not bool(rows.any()):
            return self._cross_entropy(batch, self.run.model.logits(batch))
        decoder, blocks = find_decoder(self.run.model.module)
        wanted = [k for k in self._layers if k > 0]  # embeddings are equal in both learners: they only count below
        anchors = self._slow_states(batch.rows(rows), decoder, blocks, wanted)
        mask = batch.inputs["attention_mask"].bool() & rows[:, None]
        places = mask.flatten().nonzero().squeeze(1)
        gaps: list[Tensor] = []

        def compare(k: int, states: Tensor) -> None:
            fast = states.flatten(0, 1).index_select(0, places)
            gaps.append(squared_gap(fast, anchors.pop(k), self.config.consistency == "hinge") / fast.shape[1])

        # What is compared is held until the backward pass; the output layer in pieces makes up for that.
        apart = self._output.apart() if self._output else contextlib.nullcontext()
        with showing(decoder, blocks, wanted, compare), apart:
            scores = self.run.model.logits(batch)
        consistency = torch.stack(gaps).sum() / (len(places) * len(self._layers))
        return {**self._cross_entropy(batch, scores, self._output), "consistency": self.config.gamma * consistency}

    def _slow_states(
        self, batch: Batch, decoder: nn.Module, blocks: nn.ModuleList, wanted: list[int]
    ) -> dict[int, Tensor]:
        """The slow learner's hidden states (N, d) at the N unpadded positions; without dropout and output layer.

        Runs before the fast pass: gradient checkpointing recomputes with the weights that are there at backward.
        """
        mask = batch.inputs["attention_mask"].bool()
        width = int(mask.any(dim=0).nonzero().max()) + 1  # the replayed rows may all be shorter than the new ones
        mask = mask[:, :width]
        kept: dict[int, Tensor] = {}

        def keep(k: int, states: Tensor) -> None:
            kept[k] = states[mask]

        module = self.run.model.module
        inputs = {name: value[:, :width] for name, value in batch.inputs.items()}
        slow = self.run.engine.swapped(module, self._slow_values(torch.is_autocast_enabled(self.run.model.device.type)))
        with torch.no_grad(), evaluating(module), slow, showing(decoder, blocks, wanted, keep):
            decoder(**inputs, use_cache=False)
        return kept

    def _cross_entropy(self, batch: Batch, scores: Tensor, output: OutputLayer | None = None) -> Losses:
        """Mean over all targets; in `compat` half the mean of the new rows plus half that of the replayed rows.

        Args:
            batch: new and replayed rows.
            scores: (B, P, vocabulary) logits, or (B, P, d) what goes into ``output``.
            output: the layer that is still to be applied.
        """
        targets = self.run.model.targets(batch)
        if batch.replayed is None or not self.config.compat:
            parts = {"cross_entropy": (torch.ones_like(targets[:, 0], dtype=torch.bool), 1.0)}
        else:
            parts = {
                name: (rows, 0.5)
                for name, rows in (("cross_entropy", ~batch.replayed), ("replay", batch.replayed))
                if bool(rows.any())
            }
        losses = {}
        for name, (rows, weight) in parts.items():
            flat, wanted = scores[rows].flatten(0, 1), targets[rows].flatten()
            if output is None:
                total = F.cross_entropy(flat.float(), wanted, ignore_index=-100, reduction="sum")
            else:
                total = summed_cross_entropy(output.head, flat, wanted)
            losses[name] = weight * total / max(int((wanted != -100).sum()), 1)
        return losses

    def units(self, batch: Batch) -> dict[str, float]:
        """Consistency is a mean over unpadded replayed positions, the halves of `compat` over their own targets."""
        rows = batch.replayed
        if rows is None:
            return {}
        units = {"consistency": float(batch.inputs["attention_mask"][rows].sum())}
        if self.config.compat:
            units["cross_entropy"] = float(count_targets(batch.labels[~rows]))
            units["replay"] = float(count_targets(batch.labels[rows]))
        return units

    # --- the slow learner -------------------------------------------------------------------------------------------
    def after_step(self) -> None:
        """theta_l <- lambda theta_l + (1 - lambda) theta_w, once per optimiser step."""
        if self.config.slow == "ema":
            step = self.run.position.total_steps
            self._interpolate(ema_weight(step, self.config.interpolation, self.config.ramp))

    def end_task(self, task: Task) -> None:
        """`snapshot`: the slow learner becomes the fast one."""
        if self.config.slow == "snapshot":
            self._interpolate(0.0)

    def _interpolate(self, weight: float) -> None:
        with self.run.engine.gathered(list(self._fast.values())):
            interpolate_(self.slow, self._fast, weight)

    def alternatives(self) -> dict[str, Callable[[], AbstractContextManager[nn.Module]]]:
        """`ema`: the learner that does not serve, scored in a matrix called "fast" or "slow".

        With `snapshot` both are equal when a task ends, with `base` the other one is never trained.
        """
        other = "fast" if self.config.serve == "slow" else "slow"
        return {other: partial(self.learner, other)} if self.config.slow == "ema" else {}

    def _slow_values(self, autocast: bool = False) -> dict[str, Tensor]:
        """In the type of the fast learner, or in the one that autocast computes in: equal to the last bit, but peft
        then leaves the activations in that type too, where it would cast them to float32 for every layer."""
        common = torch.get_autocast_dtype(self.run.model.device.type) if autocast else None
        return {name: value.to(common or self._fast[name].dtype) for name, value in self.slow.items()}

    def learner(self, which: str) -> AbstractContextManager[nn.Module]:
        """Within the context the module computes as the "fast" or the "slow" learner."""
        return self.run.engine.swapped(self.run.model.module, self._slow_values() if which == "slow" else {})

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The learner that ``serve`` names."""
        return self.learner(self.config.serve)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The buffer and the slow learner."""
        return {**super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, value in state["slow"].items():
            self.slow[name].copy_(value)
