"""WISE without a trainer: learns edits one at a time, keeps them in shards, merges them, takes them out again."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor

from clkit.editing import contexts, rows
from clkit.editing.prefix import Prefix, Reader
from clkit.errors import CapabilityError
from clkit.models.causal_lm import CausalLM
from clkit.models.location import locate
from clkit.modes import evaluating
from clkit.rng import fresh_generator
from clkit.strategies.wise.config import WISEConfig, settled
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.likeness import Gate, Likeness, readings_of
from clkit.strategies.wise.masks import shard_mask
from clkit.strategies.wise.merge import merge
from clkit.strategies.wise.optimise import Objective, Others, Outcome, Settings, optimise
from clkit.strategies.wise.protect import Protection
from clkit.strategies.wise.published import build_published, dense_weight
from clkit.strategies.wise.router import Router
from clkit.strategies.wise.side_memory import SideLayer, SideMemory
from clkit.tasks.base import EditRecord

# The published code's weights when a merged memory is merged again (WISE-Merge): new shards together, old one.
_PUBLISHED_AGAIN = (0.4, 0.6)
# Unrelated prompts from which the limit of likeness is measured: the newest, and not from fewer (ten of 200 may pass).
_NEWEST, _ENOUGH = 512, 200


class Wise:
    """Side memories on a model, and how edits get into them.

    Args:
        model: a language model; its own weights are never written to.
        config: options.
        seed: draws masks, negatives and what DARE drops.

    Attributes:
        layer: the memories, in the order of their shards.
        live: the memory of the shard that is being filled, or None.
        prompts: per edit, in the order of learning, its prompt and, where it has one, its irrelevant prompt.
        targets: per edit its new answer.
    """

    def __init__(self, model: CausalLM, config: WISEConfig, seed: int = 0) -> None:
        location = locate(model.module, config.layer, config.depth)
        self.model, self.config, self.seed = model, settled(config, location.shape[1]), seed
        self._weight: Tensor | None = None
        activation = None
        if config.compat:
            self._weight = dense_weight(location.projection)
            activation = _activation(location)
        always, answer_only = config.routing == "none", self.config.reach == "answer"
        self.gate = Gate(self.config.likeness, self.config.false_positive_rate)
        gate = self.gate if self.gate.limit and not always else None
        slack = cast(float, self.config.slack)  # settled
        self.router = Router(slack, activation, config.compat, always, answer_only, gate)
        self.reader = Reader(location, positions=not config.compat)
        self.layer = SideLayer(location, self.router)
        self.location = location
        self.live: SideMemory | None = None
        self.shard = 0
        self.prompts: dict[str, list[str]] = {}
        self.targets: dict[str, str] = {}
        self._contexts: list[str] | None = None
        self._units: tuple[float, float] | None = None
        self._least = math.inf
        self._readings: dict[str, Tensor] = {}
        self._said: dict[str, Tensor] = {}

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
        live = SideMemory([(self.shard, [])], self._zeros(), math.inf) if self.live is None else self.live
        units = self._units
        try:
            matrix, outcome, score = self._learn(record, live.matrix, self.shard, live.edits)
        except BaseException:
            self._units = units  # the first edit that is learned sets them
            raise
        self.live, live.matrix = live, matrix
        live.parts[0][1].append(record.id)
        self._least = min(self._least, score)
        global_minimum = self.config.compat and self.config.mode == "merge"
        live.threshold = self._least if global_minimum else min(live.threshold, score)
        self.prompts[record.id] = [p for p in (record.prompt, record.locality_prompt) if p]
        self.targets[record.id] = record.target_new
        self._remember(record)
        if live not in self.layer.all():
            self.layer.put([*self.layer.all(), live])
        self.router.forget()
        if len(live.edits) == self.config.shard_size:
            self._close()
        else:
            self._calibrate([live])
        return outcome

    def _learn(
        self, record: EditRecord, matrix: Tensor, shard: int, held: Sequence[str], gone: Set[str] = frozenset()
    ) -> tuple[Tensor, Outcome, float]:
        """Learn one edit into a shard.

        Args:
            record: the edit.
            matrix: of the shard so far.
            shard: its number.
            held: the edits in it.
            gone: edits that are being taken out.

        Returns:
            The new matrix, what happened, and the score from which the published code makes the threshold.
        """
        config, device = self.config, self.location.device
        with self.router.switched_off(), evaluating(self.model.module):
            found = self._rows(record).to(device)
            prefix = self.reader.prefix(found, found.ends if self.router.answer_only else None)
            settings = self._settings(prefix.activations, prefix.base, found)
            weight = None if self._weight is None else self._weight.to(device)
            others = None if config.compat else self._others(record, held, gone)
            objective = Objective(prefix, found, self.router, settings, weight, others)
            mask = shard_mask(self.location.shape, config.mask_ratio, self.seed, shard, config.compat).to(device)
            # What the memory says to this very prompt is what the edit replaces.
            kept = [i for i in held if i not in gone and self.prompts[i][0] != record.prompt]
            protection = self._protection(prefix, found, [] if config.compat else kept, others)
            matrix, outcome = optimise(objective, matrix, mask, protection)
        return matrix, outcome, outcome.score

    def _remember(self, record: EditRecord) -> None:
        """Let the gate know the edit's prompt."""
        if self.gate.limit:
            if self.gate.likeness is None:
                self.gate.likeness = Likeness.between(torch.stack([self.read(p) for p in contexts.IRRELEVANT]))
            self.gate.add(record.id, self.read(record.prompt))
            self._adjust()

    def _adjust(self) -> None:
        """Let the gate follow how many unrelated prompts look like an edit: those that edits came with."""
        asked = {texts[0] for texts in self.prompts.values()}
        apart = dict.fromkeys(text for texts in self.prompts.values() for text in texts[1:] if text not in asked)
        if self.gate.false_positive_rate < 1:
            known = list(apart)[-_NEWEST:] if len(apart) >= _ENOUGH else []
            self.gate.adjust([self.read(text) for text in known])

    def _protection(self, prefix: Prefix, found: rows.Rows, kept: Sequence[str], others: Others | None) -> Protection:
        """What steps leave alone: what edits ``kept`` in this memory say, and how little it says to ``others``."""
        read = self.router.read(prefix.activations, found.prompt[:, prefix.start :])[: found.edits, 0]
        size = float(read.square().sum(dim=-1).mean())
        parts = [self.said(i) for i in kept] + ([] if others is None else [others.outside])
        return Protection(torch.cat(parts) if parts else read[:0], read.mean(dim=0), size, self.config.keep)

    def said(self, edit: str) -> Tensor:
        """(P, in) what the projection reads where an edit's target and its end are predicted; kept like readings."""
        if edit not in self._said:
            form, prompt, target = self.model.form, self.prompts[edit][0], self.targets[edit]
            alone = rows.build(form, prompt, target, [], [], self.model.max_length, self.config.eos)
            alone = alone.to(self.location.device)
            with self.router.switched_off():
                x, _ = self.reader.activations(alone.input_ids, alone.attention_mask)
            self._said[edit] = x[0, alone.learned].float()
        return self._said[edit]

    def _rows(self, record: EditRecord) -> rows.Rows:
        form, config = self.model.form, self.config
        if self._contexts is None:
            self._contexts = contexts.written(
                self.location.lm, self.model.tokenizer, self.location.device, config.contexts
            )
        if config.compat:
            text = record.locality_prompt or contexts.IRRELEVANT[0]
            text = f"{text} {record.locality_answer}" if record.locality_answer else text
            made: rows.Rows = build_published(form, record.prompt, record.target_new, self._contexts, text)
            return made
        return rows.build(form, record.prompt, record.target_new, self._contexts, [], self.model.max_length, config.eos)

    def _others(self, record: EditRecord, held: Sequence[str], gone: Set[str]) -> Others:
        """What the router has to keep apart while ``record`` is learned, and what it has to keep with it.

        Not to be answered by this memory: the record's irrelevant prompt, built-in ones, those of earlier edits, and
        the prompts of earlier edits in other memories. To be answered as before: prompts of earlier edits in this one.
        """
        earlier = itertools.takewhile(lambda i: i != record.id, self.prompts)  # when learned again: those before it
        before = [i for i in earlier if i not in gone]
        mine = {i: self.prompts[i][0] for i in before if i in set(held)}
        answered = {record.prompt, *mine.values()}
        apart = [p for i in before for p in (self.prompts[i][1:] if i in mine else self.prompts[i])]
        own = [record.locality_prompt] if record.locality_prompt else []
        outside = [*own, *self._drawn(contexts.IRRELEVANT, self.config.negatives, "negatives", record.id)]
        outside += self._drawn(apart, self.config.history, "history", record.id)
        inside = self._drawn(list(mine.values()), self.config.history, "kept", record.id)
        wanted = [p for p in dict.fromkeys(outside) if p not in answered]
        return Others(self._stacked(inside), self._stacked(wanted))

    def _drawn(self, texts: Sequence[str], count: int, purpose: str, name: str) -> list[str]:
        """At most ``count`` of ``texts``."""
        order = torch.randperm(len(texts), generator=fresh_generator(self.seed, f"wise {purpose}", name))
        return [texts[i] for i in order[:count].tolist()]

    def _stacked(self, prompts: Sequence[str]) -> Tensor:
        """(N, in) the readings of ``prompts``."""
        empty = self._zeros()[:0]
        return torch.stack([self.reading(p) for p in prompts]) if prompts else empty

    def _settings(self, activations: Tensor, base: Tensor, found: rows.Rows) -> Settings:
        """The configured numbers in the layer's units, which the first edit sets.

        Scores are in units of the median size of the projection's outputs where they are read, and a step of 1 moves a
        score by about one such unit: the change of x dW goes with the squared size of x and with the part of it that
        may move. A clamp of 1 is an output's size over an input's.
        """
        c = self.config
        numbers = (c.steps, c.learning_rate, c.clamp, c.stop_loss, c.alpha, c.beta, c.gamma)
        steps, rate, clamp, stop, *margins = (n if n is not None else math.nan for n in numbers)
        unit, step = 1.0, 1.0
        if not c.compat:
            if self._units is None:
                prompt = found.prompt[:, -base.shape[1] :]
                outputs, inputs = self.router.read(base, prompt), self.router.read(activations, prompt)
                self._units = float(outputs.norm(dim=-1).median()), float(inputs.square().sum(dim=-1).median())
            unit, squared = self._units
            step = unit * unit / (squared * c.mask_ratio)
            clamp *= unit / squared**0.5
        return Settings(int(steps), rate * step, *margins, clamp, stop, unit)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.location.shape, dtype=torch.float32, device=self.location.device)

    # --- shards -----------------------------------------------------------------------------------------------------
    def _close(self) -> None:
        """End the live shard; merge when the schedule says so."""
        if self.live is None:
            return
        closed, self.live, self.shard = self.live, None, self.shard + 1
        self._round(closed)
        self._calibrate([closed])
        edits = len(self._loose()) * cast(int, self.config.shard_size)
        if self.config.merge_every and edits >= self.config.merge_every:
            self.consolidate()

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
        self._calibrate(self.layer.all())

    def _calibrate(self, memories: Sequence[SideMemory]) -> None:
        if self.config.compat:
            return
        for memory in memories:
            if memory.edits:
                memory.threshold = float(self.scores(memory, [self.prompts[i][0] for i in memory.edits]).min())

    @torch.no_grad()
    def scores(self, memory: SideMemory, prompts: Sequence[str]) -> Tensor:
        """(N,) what each prompt scores at ``memory``, on the CPU."""
        found: Tensor = (self._stacked(prompts) @ memory.matrix.T).norm(dim=-1).cpu()
        return found

    def reading(self, prompt: str) -> Tensor:
        """(in,) what the projection reads at the last token of a prompt."""
        return self.read(prompt)[0]

    def read(self, prompt: str, keep: bool = True) -> Tensor:
        """(2, in) what the projection reads of a prompt, for :class:`Likeness`.

        Each prompt is computed by itself, so that it is the same bits whenever it is computed again.

        Args:
            prompt: one text.
            keep: remember it as long as its edit is there; False for what is only asked about.
        """
        found = self._readings.get(prompt)
        if found is None:
            ids = rows.prompt_ids(self.model.form, [prompt], self.model.max_length)
            tokens = torch.tensor(ids, device=self.location.device)
            with self.router.switched_off():
                x, _ = self.reader.activations(tokens, torch.ones_like(tokens))
            found = readings_of(x, None)[0]
            if keep:
                self._readings[prompt] = found
        return found.to(self.location.device)  # the model may have moved since

    # --- taking edits out -------------------------------------------------------------------------------------------
    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out: the others of their memories are learned again without them.

        Args:
            ids: of edits that were learned.
            records: of all edits in their memories.

        Returns:
            The ids of the edits that were learned again.

        Raises:
            NumericalError: one of them can't be; nothing has changed.
        """
        gone, again = set(ids), []
        memories, live = self.layer.all(), self.live
        for place, memory in enumerate(memories):
            if not gone & set(memory.edits):
                continue
            rest = [(shard, [i for i in part if i not in gone]) for shard, part in memory.parts]
            renewed = [self._relearn(shard, part, records, gone, memory is self.live) for shard, part in rest]
            whole = renewed[0] if len(renewed) == 1 else self._merged(renewed, [1 / len(renewed)] * len(renewed))
            if memory is self.live:
                live = whole
            memories[place] = whole
            again += whole.edits
        for i in gone:
            for prompt in self.prompts.pop(i, []):
                self._readings.pop(prompt, None)
            self.targets.pop(i, None)
            self._said.pop(i, None)
            self.gate.prints.pop(i, None)
        self.live = live if live is not None and live.edits else None
        self.layer.put([m for m in memories if m.edits])
        self.calibrate()
        if self.gate.limit:
            self._adjust()
        return again

    def _relearn(
        self, shard: int, ids: Sequence[str], records: Mapping[str, EditRecord], gone: Set[str], live: bool
    ) -> SideMemory:
        memory = SideMemory([(shard, ids)], self._zeros(), math.inf)
        for place, i in enumerate(ids):
            memory.matrix, _, score = self._learn(records[i], memory.matrix, shard, ids[:place], gone)
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
            "targets": self.targets,
            "likeness": self.gate.state_dict(),
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
        self.targets = dict(state["targets"])
        self.gate.load_state_dict(state["likeness"], list(self.prompts))
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
