"""The clipped sum of the units' gradients, by whatever way the model allows.

``hooks``: Opacus' hooks keep every example's gradient; cheap for adapters.
``ghost``: Opacus' ghost clipping needs only the norms, and a second backward pass; for full fine-tuning.
``loop``: one unit at a time through the module; for every model, at the speed of single examples.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.errors import CapabilityError
from clkit.models.location import decoder_blocks

Way = Literal["hooks", "ghost", "loop"]

# Opacus adds it to a norm before dividing, and so do we everywhere.
_TINY = 1e-6
# Full fine-tuning keeps all examples' gradients only where they are no more numbers than this (256 MiB in float32).
_MOST_KEPT = 2**26
_UNSEEN = (
    "engine.per_unit: a parameter has a gradient, but Opacus' hooks did not see that of every example; take "
    "engine.per_unit=loop"
)
_MERGED = (
    "engine.per_unit: a trained layer gets the tokens of all examples as rows of one matrix (as fc1 and fc2 of OPT and "
    "the experts of mixtures do), so Opacus' hooks would clip each token by itself; take engine.per_unit=loop"
)
_SHARED = (
    "engine.per_unit: a trained layer is used more than once in a pass, which Opacus' ghost clipping can't do; take "
    "engine.per_unit=loop"
)


class Clipper:
    """Adds up clipped unit gradients over the pieces of a batch.

    Args:
        module: in training mode when it runs.
        parameters: everything in it that is trained.
        clip: largest norm of a unit's gradient over all parameters; 0 = no clipping.
        way: how a unit's gradient is had.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], clip: float, way: Way) -> None:
        self.way = way
        self._parameters = list(parameters)
        self._clip = clip
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._left: Counter[int] = Counter()
        self._open: dict[int, list[Tensor | None]] = {}
        self._hooks = _attach(module, way)
        self._entry = Entry(module, self._parameters) if way == "hooks" else None
        self._moved: list[bool] = []  # which parameters get a gradient: known after the first batch

    def expect(self, units: Sequence[int]) -> None:
        """A new batch: the unit of each of its rows."""
        self._left, self._open = Counter(units), {}
        self._sums = [None] * len(self._parameters)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the pass that the losses come from.

        Raises:
            CapabilityError: a layer runs twice in it, which ghost clipping can't do.
        """
        try:
            yield
        except NotImplementedError as error:  # of Opacus' forward hook
            if self.way != "ghost" or "tying" not in str(error):
                raise
            raise CapabilityError(_SHARED) from error

    def add(self, losses: Tensor, units: Sequence[int]) -> None:
        """Add what a piece of the batch gives.

        Args:
            losses: (B,) each row's loss, with its graph.
            units: of the B rows; in a loop all the same.
        """
        self._left -= Counter(units)
        if self.way == "ghost":
            self._add_ghost(losses)
        elif self.way == "loop":
            (unit,) = set(units)
            found = torch.autograd.grad(losses.sum(), self._parameters, allow_unused=True)
            self._add_units([unit], [None if g is None else g[None] for g in found])
        else:
            self._add_units(*_by_unit(list(units), self._kept_by_hooks(losses)))

    def take(self) -> list[Tensor | None]:
        """The sum of the clipped gradients of the batch's units; None for a parameter that none of them moved.

        Raises:
            RuntimeError: not all of the batch has come.
        """
        if self._open or self._left.total():
            raise RuntimeError(f"{self._left.total()} rows of the batch are missing")
        sums, self._sums = self._sums, [None] * len(self._parameters)
        return sums

    def close(self) -> None:
        """Take the hooks off the module."""
        if self._hooks is not None:
            self._hooks.cleanup()
            self._hooks = None
        if self._entry is not None:
            self._entry.close()

    # --- the ways ---------------------------------------------------------------------------------------------------
    def _kept_by_hooks(self, losses: Tensor) -> list[Any]:
        leaves = self._entry.take() if self._entry is not None else []
        _backward(losses.sum(), inputs=leaves if self._moved and leaves else None)
        if not self._moved:
            self._moved = [p.grad is not None for p in self._parameters]
        found: list[Any] = []
        for moved, parameter in zip(self._moved, self._parameters, strict=True):
            kept = getattr(parameter, "grad_sample", None)
            if isinstance(kept, list) or (kept is None and (moved if leaves else parameter.grad is not None)):
                raise CapabilityError(_UNSEEN)
            if kept is not None and len(kept) != len(losses):
                raise CapabilityError(_MERGED)
            found.append(kept)
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return found

    def _add_ghost(self, losses: Tensor) -> None:
        _backward(losses.sum(), retain_graph=True)
        norms = []
        for parameter in self._parameters:
            norm = parameter.__dict__.pop("_norm_sample", None)
            if norm is None and parameter.grad is not None:
                raise CapabilityError(_UNSEEN)
            if norm is not None and len(norm) != len(losses):
                raise CapabilityError(_MERGED)
            norms += [] if norm is None else [norm]
            parameter.grad = None
        factors = self._factors(torch.stack(norms).norm(dim=0))
        self._hooks.disable_hooks()
        _backward((factors * losses).sum())
        self._hooks.enable_hooks()
        self._sum_up([p.grad for p in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None

    def _add_units(self, units: list[int], gradients: Sequence[Any]) -> None:
        """Clip and add the gradients (U, ...) of units that are complete; keep the others' for the next piece."""
        whole = [i for i, u in enumerate(units) if u not in self._open and u not in self._left]
        if len(whole) == len(units):
            self._clip_and_sum(gradients)
            return
        if whole:
            self._clip_and_sum([None if g is None else g[whole] for g in gradients])
        for place in sorted({*range(len(units))} - {*whole}):
            unit = units[place]
            mine = [None if g is None else g[place : place + 1].clone() for g in gradients]
            if unit in self._open:
                mine = [_plus(a, b) for a, b in zip(self._open.pop(unit), mine, strict=True)]
            if unit in self._left:
                self._open[unit] = mine
            else:
                self._clip_and_sum(mine)

    def _clip_and_sum(self, gradients: Sequence[Any]) -> None:
        whole = [None if g is None else g.to(p.dtype) for g, p in zip(gradients, self._parameters, strict=True)]
        there = [g for g in whole if g is not None]
        if not there:
            return
        factors = self._factors(torch.stack([g.flatten(1).norm(dim=1) for g in there]).norm(dim=0))
        self._sum_up([None if g is None else torch.einsum("u,u...->...", factors.to(g.dtype), g) for g in whole])

    def _factors(self, norms: Tensor) -> Tensor:
        return (self._clip / (norms + _TINY)).clamp(max=1.0) if self._clip > 0 else torch.ones_like(norms)

    def _sum_up(self, gradients: Sequence[Tensor | None]) -> None:
        self._sums = [_plus(a, b) for a, b in zip(self._sums, gradients, strict=True)]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)


def _by_unit(units: list[int], gradients: list[Any]) -> tuple[list[int], list[Any]]:
    """The gradients (B, ...) of rows added up to those (U, ...) of the units that they belong to."""
    places = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    if len(places) == len(units):
        return units, gradients
    rows = torch.tensor([places[u] for u in units])
    return list(places), [
        None if g is None else g.new_zeros(len(places), *g.shape[1:]).index_add_(0, rows.to(g.device), g)
        for g in gradients
    ]


class Entry:
    """What goes into the first block of a language model that is trained, as a leaf.

    A backward pass to it runs the hooks of all blocks, and leaves out the parameters' own gradients: of an adapter they
    cost as much as those of the single examples, and nobody reads them.

    Args:
        module: the network; a forward hook is put on it where it has such a block.
        parameters: everything in it that is trained.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._leaves: list[Tensor] = []
        self._handle: Any = None
        blocks = decoder_blocks(module)
        mine = {id(p) for p in parameters}
        inside = [mine & {id(p) for p in block.parameters()} for block in (blocks[2] if blocks else ())]
        if blocks and mine and set().union(*inside) == mine:
            first = next(i for i, own in enumerate(inside) if own)
            self._handle = blocks[2][first].register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs.get("hidden_states")
        if not torch.is_grad_enabled() or not isinstance(states, Tensor) or states.requires_grad:
            return None
        leaf = states.detach().requires_grad_()
        self._leaves.append(leaf)
        return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

    def take(self) -> list[Tensor]:
        """What went in since the last call."""
        found, self._leaves = self._leaves, []
        return found

    def close(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _backward(loss: Tensor, retain_graph: bool = False, inputs: list[Tensor] | None = None) -> None:
    with warnings.catch_warnings():
        # The first trained layer's input needs no gradient, so torch can't give Opacus' hook one. It uses the output's.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=inputs)


def _attach(module: nn.Module, way: Way) -> Any:
    if way == "loop":
        return None
    if way == "ghost":
        from opacus.grad_sample import GradSampleHooksFastGradientClipping

        return GradSampleHooksFastGradientClipping(module, loss_reduction="sum")
    from opacus.grad_sample import GradSampleHooks

    return GradSampleHooks(module, loss_reduction="sum")


def choose_way(
    module: nn.Module, parameters: Sequence[nn.Parameter], *, asked: str, grouped: bool, autocast: bool, rows: int
) -> tuple[Way, str]:
    """How the units' gradients of this model are had, and why.

    Args:
        module: the network.
        parameters: what is trained.
        asked: ``auto``, or a way.
        grouped: whether a unit can have several rows.
        autocast: whether the module computes in less than its weights' type.
        rows: that go through the module together.

    Raises:
        CapabilityError: the way that was asked for does not fit the model.
    """
    no_hooks = _against_hooks(module)
    no_ghost = no_hooks or _against_ghost(module, grouped, autocast)
    if asked != "auto":
        against = {"hooks": no_hooks, "ghost": no_ghost}.get(asked, "")
        if against:
            raise CapabilityError(f"engine.per_unit: {asked} does not work here, because {against}; take auto or loop")
        return asked, "asked for"  # type: ignore[return-value]
    count = sum(p.numel() for p in parameters)
    if count < sum(p.numel() for p in module.parameters()) / 2 and not no_hooks:
        return "hooks", f"{count:,} of the parameters are trained"
    if not no_ghost:
        return "ghost", "all parameters are trained, in layers that allow it"
    if not no_hooks and count * rows <= _MOST_KEPT:
        return "hooks", f"no ghost clipping, because {no_ghost}; {rows} gradients of {count:,} numbers fit"
    return "loop", f"neither hooks nor ghost clipping, because {no_ghost}"


def _against_hooks(module: nn.Module) -> str:
    if any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        return "activations are recomputed (model.gradient_checkpointing)"
    embed = getattr(module, "get_input_embeddings", lambda: None)()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding) and layer is not embed and layer.weight.requires_grad:
            return f"'{name}' embeds positions once for all rows"
        if any(p.requires_grad for p in layer.parameters(recurse=False)) and any(True for _ in layer.buffers()):
            return f"'{name}' has weights and buffers"
    return ""


def _against_ghost(module: nn.Module, grouped: bool, autocast: bool) -> str:
    if grouped:
        return "a subject's records are clipped as one"
    if autocast:
        return "two backward passes in a lower precision need not give the same gradient"
    owners: Counter[int] = Counter()
    for name, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        owners.update(id(p) for p in own)
        known = type(layer) in (nn.Linear, nn.Embedding, nn.LayerNorm) or type(layer).__name__.endswith("RMSNorm")
        if own and not known:
            return f"'{name}' is a {type(layer).__name__}"
    return "weights are tied" if any(count > 1 for count in owners.values()) else ""
