"""WISE without a trainer: learns edits one at a time, keeps them in shards, merges them, takes them out again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clkit.editing import contexts, rows
from clkit.editing.prefix import Reader
from clkit.errors import CapabilityError
from clkit.models.causal_lm import CausalLM
from clkit.models.location import locate
from clkit.modes import evaluating
from clkit.rng import fresh_generator
from clkit.strategies.wise.config import WISEConfig, settled
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.masks import shard_mask
from clkit.strategies.wise.merge import merge
from clkit.strategies.wise.optimise import Objective, Outcome, Settings, optimise
from clkit.strategies.wise.published import build_published, dense_weight
from clkit.strategies.wise.router import Router
from clkit.strategies.wise.side_memory import SideLayer, SideMemory
from clkit.tasks.base import EditRecord

# The published code's weights when a merged memory is merged again (WISE-Merge): new shards together, old one.
_PUBLISHED_AGAIN = (0.4, 0.6)


class Wise:
    """Side memories on a model, and how edits get into them.

    Args:
        model: a language model; its own weights are never written to.
        config: options.
        seed: draws masks, negatives and what DARE drops.

    Attributes:
        layer: the memories, in the order of their shards.
        live: the memory of the shard that is being filled, or None.
        prompts: per edit its prompt and its irrelevant prompts, from which thresholds are measured.
    """

    def __init__(self, model: CausalLM, config: WISEConfig, seed: int = 0) -> None:
        self.model, self.config, self.seed = model, settled(config), seed
        location = locate(model.module, config.layer, config.depth)
        self._weight: Tensor | None = None
        activation = None
        if config.compat:
            self._weight = dense_weight(location.projection)
            activation = _activation(location)
        self.router = Router(self.config.slack, activation, config.compat, config.routing == "none")
        self.reader = Reader(location, positions=not config.compat)
        self.layer = SideLayer(location, self.router)
        self.location = location
        self.live: SideMemory | None = None
        self.shard = 0
        self.prompts: dict[str, list[str]] = {}
        self._contexts: list[str] | None = None
        self._units: tuple[float, float] | None = None
        self._least = math.inf
        self._readings: dict[str, Tensor] = {}

    def remove(self) -> None:
        """Take everything off the model, which is then what it was before."""
        self.layer.remove()

    # --- learning ---------------------------------------------------------------------------------------------------
    def learn(self, record: EditRecord) -> Outcome:
        """Learn one edit into the live shard; a full shard is closed, and merged when it is time.

        Raises:
            NumericalError: the loss is not finite; nothing has changed.
            RequestError: the edit does not fit the model; nothing has changed.
        """
        if self.live is None:
            self.live = SideMemory([(self.shard, [])], self._zeros(), math.inf)
        matrix, outcome, score = self._learn(record, self.live.matrix, self.shard)
        live = self.live
        live.matrix = matrix
        live.parts[0][1].append(record.id)
        self._least = min(self._least, score)
        global_minimum = self.config.compat and self.config.mode == "merge"
        live.threshold = self._least if global_minimum else min(live.threshold, score)
        self.prompts[record.id] = [record.prompt, *self._irrelevant(record)]
        if live not in self.layer.all():
            self.layer.put([*self.layer.all(), live])
        self.router.forget()
        if len(live.edits) == self.config.shard_size:
            self._close()
        return outcome

    def _learn(self, record: EditRecord, matrix: Tensor, shard: int) -> tuple[Tensor, Outcome, float]:
        """The new matrix, what happened, and the score from which the memory's threshold is made."""
        config, device = self.config, self.location.device
        with self.router.switched_off(), evaluating(self.model.module):
            found = self._rows(record).to(device)
            prefix = self.reader.prefix(found)
            settings = self._settings(prefix.activations, prefix.base, found)
            weight = None if self._weight is None else self._weight.to(device)
            objective = Objective(prefix, found, self.router, settings, weight)
            mask = shard_mask(self.location.shape, config.mask_ratio, self.seed, shard, config.compat).to(device)
            matrix, outcome = optimise(objective, matrix, mask)
        if config.compat:
            return matrix, outcome, outcome.score
        return matrix, outcome, float((matrix @ self.reading(record.prompt)).norm())

    def _rows(self, record: EditRecord) -> rows.Rows:
        form, config = self.model.form, self.config
        if self._contexts is None:
            self._contexts = contexts.written(
                self.location.lm, self.model.tokenizer, self.location.device, config.contexts
            )
        irrelevant = self._irrelevant(record)
        if config.compat:
            published: rows.Rows = build_published(
                form, record.prompt, record.target_new, self._contexts, irrelevant[0]
            )
            return published
        return rows.build(
            form, record.prompt, record.target_new, self._contexts, irrelevant, self.model.max_length, config.eos
        )

    def _irrelevant(self, record: EditRecord) -> list[str]:
        """The record's own irrelevant prompt, and further ones drawn from those built in."""
        if self.config.compat:
            text = record.locality_prompt or contexts.IRRELEVANT[0]
            return [f"{text} {record.locality_answer}" if record.locality_answer else text]
        own = [record.locality_prompt] if record.locality_prompt else []
        pool = [p for p in contexts.IRRELEVANT if p not in (*own, record.prompt)]
        drawn = torch.randperm(len(pool), generator=fresh_generator(self.seed, "wise negatives", record.id)).tolist()
        return [*own, *(pool[i] for i in drawn[: max(self.config.negatives, 1 - len(own))])]

    def _settings(self, activations: Tensor, base: Tensor, found: rows.Rows) -> Settings:
        """The configured numbers in the layer's units, which the first edit sets.

        Scores are in units of the median size of the projection's outputs where they are read, and a step of 1 moves a
        score by about one such unit: the change of x dW goes with the squared size of x and with the part of it that
        may move.
        """
        c = self.config
        numbers = (c.steps, c.learning_rate, c.stop_loss, c.alpha, c.beta, c.gamma)
        steps, rate, stop, *margins = (n if n is not None else math.nan for n in numbers)
        unit, step = 1.0, 1.0
        if not c.compat:
            if self._units is None:
                outputs, inputs = self.router.read(base, found.prompt), self.router.read(activations, found.prompt)
                self._units = float(outputs.norm(dim=-1).median()), float(inputs.square().sum(dim=-1).median())
            unit, squared = self._units
            step = unit * unit / (squared * c.mask_ratio)
        return Settings(int(steps), rate * step, *margins, c.clamp, stop, unit)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.location.shape, device=self.location.device)

    # --- shards -----------------------------------------------------------------------------------------------------
    def _close(self) -> None:
        """End the live shard; merge when the schedule says so."""
        if self.live is None:
            return
        self._round(self.live)
        self.live, self.shard = None, self.shard + 1
        loose = self._loose()
        if self.config.merge_every and len(loose) * self.config.shard_size >= self.config.merge_every:
            self.consolidate()
        else:
            self.calibrate()

    def _loose(self) -> list[SideMemory]:
        """Closed shards that are not merged yet."""
        return [m for m in self.layer.all() if len(m.parts) == 1 and m is not self.live]

    def _round(self, memory: SideMemory) -> None:
        """A closed shard holds exactly what its storage can hold."""
        delta = SparseDelta.from_dense(memory.matrix).rounded(self.config.storage)
        memory.matrix = delta.dense().to(self.location.device)

    def consolidate(self) -> None:
        """Merge the closed shards into one memory (``mode: merge``: and with the memory that earlier ones became)."""
        loose, others = self._loose(), [m for m in self.layer.all() if len(m.parts) > 1]
        again = others if self.config.mode == "merge" else []
        merged = [*again, *loose]
        if len(merged) < 2:
            return
        memory = self._merged(merged, self._weights(again, loose))
        kept = [m for m in self.layer.all() if m not in merged]
        self.layer.put(sorted([memory, *kept], key=lambda m: m.parts[0][0]))
        self.calibrate()

    def _weights(self, again: Sequence[SideMemory], loose: Sequence[SideMemory]) -> list[float]:
        if self.config.compat and again:
            new, old = _PUBLISHED_AGAIN
            return [old / len(again)] * len(again) + [new / len(loose)] * len(loose)
        total = sum(len(m.parts) for m in (*again, *loose))
        return [len(m.parts) / total for m in (*again, *loose)]

    def _merged(self, memories: Sequence[SideMemory], weights: Sequence[float]) -> SideMemory:
        deltas = [SparseDelta.from_dense(m.matrix) for m in memories]
        parts = [part for m in memories for part in m.parts]
        generator = fresh_generator(self.seed, "wise dare", *(shard for shard, _ in parts))
        delta = merge(deltas, weights, self.config.merge, self.config.density, generator).rounded(self.config.storage)
        return SideMemory(parts, delta.dense().to(self.location.device), min(m.threshold for m in memories))

    # --- thresholds -------------------------------------------------------------------------------------------------
    def calibrate(self) -> None:
        """Measure the threshold of every memory anew, from its edits' prompts and its matrix as it is now."""
        if self.config.compat:
            return
        for memory in self.layer.all():
            if memory.edits:
                memory.threshold = float(self.scores(memory, [self.prompts[i][0] for i in memory.edits]).min())

    @torch.no_grad()
    def scores(self, memory: SideMemory, prompts: Sequence[str]) -> Tensor:
        """(N,) what each prompt scores at ``memory``, on the CPU."""
        readings = torch.stack([self.reading(p) for p in prompts])
        found: Tensor = (readings @ memory.matrix.T).norm(dim=-1).cpu()
        return found

    def reading(self, prompt: str) -> Tensor:
        """(in,) what the projection reads at the last token of a prompt; kept while the process lives.

        Each prompt is computed by itself, so that it is the same bits whenever it is computed again.
        """
        if prompt not in self._readings:
            ids = rows.prompt_ids(self.model.form, [prompt], self.model.max_length)
            tokens = torch.tensor(ids, device=self.location.device)
            with self.router.switched_off():
                x, _ = self.reader.activations(tokens, torch.ones_like(tokens))
            self._readings[prompt] = x[0, -1].float()
        return self._readings[prompt]

    # --- taking edits out -------------------------------------------------------------------------------------------
    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out: the others of their memories are learned again without them.

        Args:
            ids: of edits that were learned.
            records: of all edits in their memories.

        Returns:
            The ids of the edits that were learned again.
        """
        gone, again = set(ids), []
        memories = self.layer.all()
        for place, memory in enumerate(memories):
            if not gone & set(memory.edits):
                continue
            rest = [(shard, [i for i in part if i not in gone]) for shard, part in memory.parts]
            renewed = [self._relearn(shard, part, records, memory is self.live) for shard, part in rest]
            whole = renewed[0] if len(renewed) == 1 else self._merged(renewed, [1 / len(renewed)] * len(renewed))
            if memory is self.live:
                self.live = whole
            memories[place] = whole
            again += whole.edits
        for i in gone:
            for prompt in self.prompts.pop(i, []):
                self._readings.pop(prompt, None)
        if self.live is not None and not self.live.edits:
            self.live = None
        self.layer.put([m for m in memories if m.edits])
        self.calibrate()
        return again

    def _relearn(self, shard: int, ids: Sequence[str], records: Mapping[str, EditRecord], live: bool) -> SideMemory:
        memory = SideMemory([(shard, ids)], self._zeros(), math.inf)
        for i in ids:
            memory.matrix, _, score = self._learn(records[i], memory.matrix, shard)
            memory.threshold = min(memory.threshold, score)
        if not live:
            self._round(memory)
        return memory

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """Within, the model answers as if there were no edits."""
        with self.router.switched_off():
            yield

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON and tensors: all that is needed to serve and to go on."""
        storage = self.config.storage
        return {
            "shard": self.shard,
            "least": self._least if math.isfinite(self._least) else None,
            "contexts": self._contexts,
            "units": None if self._units is None else list(self._units),
            "prompts": self.prompts,
            "live": self.live is not None,
            "memories": [m.to_state("float32" if m is self.live else storage) for m in self.layer.all()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.shard = state["shard"]
        self._least = math.inf if state["least"] is None else state["least"]
        self._contexts = state["contexts"]
        self._units = None if state["units"] is None else (state["units"][0], state["units"][1])
        self.prompts = {i: list(texts) for i, texts in state["prompts"].items()}
        self.layer.put([SideMemory.from_state(m) for m in state["memories"]])
        self.live = self.layer.all()[-1] if state["live"] else None


def _activation(location: Any) -> Any:
    """The model's own activation function, which the published score applies to the projection's output."""
    from transformers.activations import ACT2FN

    config = location.decoder.config
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if name is None:
        raise CapabilityError(
            "strategy.compat needs the model's activation function, which its configuration does not name"
        )
    return ACT2FN[name]
