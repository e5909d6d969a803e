"""The private engine: DP-SGD and DP-Adam(W) on Opacus, on one process or several.

Every step draws units (records or subjects) by Poisson sampling, clips the gradient of each unit's own loss to
``train.clip``, adds Gaussian noise of ``noise_multiplier * clip`` to their sum, divides by the expected number of
records, and gives that to the optimiser. An empty batch is a step like any other. What is private is the trained
weights; losses and scores in the run's directory are not.

Every process has the whole model. All draw the same batch, from a secret of the first; each clips and adds up its share
of the units; the first adds the noise, once, to its sum; then the sums are added up over the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from clkit.config import EngineConfig, TrainConfig, opt
from clkit.engine import launch
from clkit.engine.accounting import Noisy, sigma_for
from clkit.engine.clipping import Clipper, choose_way
from clkit.engine.guarantee import FILE, LITTLE_NOISE, NO_NOISE, VOID, Spent, epsilon_now, plan, rate_of
from clkit.engine.local import LocalEngine
from clkit.engine.poisson import Draws, PoissonBatches, Units, units_of
from clkit.errors import CapabilityError, Problem
from clkit.models.base import Model
from clkit.tasks.batch import Batch

if TYPE_CHECKING:
    from clkit.rundir import RunDirectory
    from clkit.strategy import Strategy


@dataclass
class PrivateConfig(EngineConfig):
    """Options of private training; ``train.clip`` is the clipping norm, ``train.micro_batch`` the physical batch."""

    unit: str = opt(
        "record", "what is protected as one: a record, or all records of a subject", choices=("record", "subject")
    )
    target_epsilon: float | None = opt(None, "epsilon of one unit after all steps; finds the noise", above=0)
    noise_multiplier: float | None = opt(None, "noise over the clipping norm, in place of target_epsilon", min=0)
    delta: float | None = opt(
        None, "chance that the guarantee fails; null = the smaller of 1e-5 and a tenth of 1 / units", above=0, max=0.5
    )
    accountant: str = opt("prv", "prv (tight) or rdp (fast, looser)", choices=("prv", "rdp"))
    per_unit: str = opt(
        "auto",
        "how gradients of single units are had: Opacus' hooks, its ghost clipping, or one unit at a time",
        choices=("auto", "hooks", "ghost", "loop"),
    )
    test_seed: int | None = opt(None, "for tests only: repeatable noise and sampling, which VOIDS the guarantee", min=0)


class PrivateEngine(LocalEngine):
    """Differentially private, on one process or several."""

    config_class = PrivateConfig
    several = True
    config: PrivateConfig

    def __init__(self, config: PrivateConfig) -> None:
        super().__init__(config)
        shared = None
        if launch.running():
            self.device = launch.own(self.device)
            self.group = launch.join(self.device)
            (shared, *_) = self.group.all_gather(secrets.randbits(128) if self.is_main else None)
        self._draws = Draws(config.test_seed, shared)
        self._spent = Spent()
        self._module: nn.Module | None = None
        self._clipper: Clipper | None = None
        self._units: Units | None = None
        self._each: tuple[Tensor, Batch] | None = None
        self._rate = self._expected = 0.0
        self._facts: dict[str, Any] = {}
        self._directory: RunDirectory | None = None

    @classmethod
    def check(cls, config: PrivateConfig) -> list[Problem]:
        """Exactly one of the two ways to say how much noise there is."""
        given = [n for n in ("target_epsilon", "noise_multiplier") if getattr(config, n) is not None]
        if len(given) == 1:
            return []
        got = "both" if given else "neither"
        return [Problem("engine.target_epsilon", f"give it or engine.noise_multiplier, one of them (got {got})")]

    # --- the run ----------------------------------------------------------------------------------------------------
    def admit(self, strategy: Strategy) -> None:
        """Refuse what does not go with differential privacy, and find the noise.

        Raises:
            CapabilityError: rehearsal, batch normalisation, float16, no clipping, or records without a subject.
            ConfigError: no noise is enough.
        """
        config = strategy.run.config
        problems = []
        if strategy.exemplar_limit(0):
            what = "a rehearsed example is used in steps that did not draw it; set it to 0"
            problems.append(Problem("strategy.replay.size", what))
        if not config.train.clip and self.config.noise_multiplier != 0:
            problems.append(Problem("train.clip", "0 does not clip, so no noise is enough; set it above 0"))
        if config.model.dtype == "float16":
            problems.append(Problem("model.dtype", "the loss scaling of float16 is not supported; take bfloat16"))
        if _built_with_batch_norm(strategy):
            problems.append(Problem("model.name", f"'{config.model.name}' has batch normalisation. {_COUPLES}"))
        if problems:
            raise CapabilityError.collect("The private engine can't do this run:", problems)
        self._plan(strategy)

    def _plan(self, strategy: Strategy) -> None:
        """Settle noise and delta once; the same again when a run goes on."""
        if "planned" in self._facts:
            return
        config = self.config
        unit: Any = config.unit  # one of the two that the option takes
        accountant: Any = config.accountant
        stages, units = plan(strategy, unit)
        delta = config.delta or min(1e-5, 0.1 / max(1, units))
        sigma = config.noise_multiplier
        if sigma is None:
            wanted = config.target_epsilon or 0.0  # the check of the options has seen one of the two
            sigma = sigma_for(wanted, [(s.rate, s.steps) for s in stages], delta, accountant)
        void = VOID if config.test_seed is not None else None if sigma else NO_NOISE
        self._facts |= {
            "unit": config.unit,
            "units": units,
            "noise_multiplier": sigma,
            "clip": strategy.run.config.train.clip,
            "delta": delta,
            "accountant": config.accountant,
            "target_epsilon": config.target_epsilon,
            "planned": [s._asdict() for s in stages],
            "void": void,
        }
        rows = [Noisy(sigma, s.rate, s.steps) for s in stages]
        self._facts["planned_epsilon"] = epsilon_now(self._facts | {"spent": rows})
        if self._facts["planned_epsilon"] is None:
            self._facts["void"] = void or LITTLE_NOISE

    def notes(self) -> list[str]:
        """Noise, sampling and epsilon as planned."""
        facts = self._facts
        rates = sorted({f"{stage['rate']:.3g}" for stage in facts["planned"]})
        after = facts["planned_epsilon"]
        bound = (
            f"no guarantee: {facts['void']}" if after is None else f"epsilon {after:.3g} at delta {facts['delta']:.1e}"
        )
        drawn = f"{facts['units']} {facts['unit']}s drawn at rate {', '.join(rates)}, clipped to {facts['clip']:g}"
        return [f"private: {drawn}, noise multiplier {facts['noise_multiplier']:.4g}; {bound}"]

    def prepare(self, model: Model) -> None:
        """Move the module to the device.

        Raises:
            CapabilityError: batch normalisation, or one that keeps statistics, is trained in it; or it computes in
                float16.
        """
        super().prepare(model)
        if self._scaler is not None:
            raise CapabilityError("model.dtype: the loss scaling of float16 is not supported by the private engine")
        self._module = model.module
        trained = _trained_modules(model.module)
        if any(isinstance(m, _BatchNorm) for m in trained):
            raise CapabilityError(f"model.name: '{model.name}' has batch normalisation. {_COUPLES}")
        if any(isinstance(m, _InstanceNorm) and m.running_mean is not None for m in trained):
            raise CapabilityError(f"model.name: '{model.name}' has instance normalisation {_KEEPS}")

    def record_in(self, directory: RunDirectory) -> None:
        """Keep the count of noisy steps in ``noisy_steps.txt``."""
        self._directory = directory
        self._spent.keep_in(directory.path / FILE)

    def start(
        self,
        parameters: Sequence[nn.Parameter],
        train: TrainConfig,
        total_steps: int,
        *,
        keep_moments: bool = False,
        keep_schedule: bool = False,
    ) -> None:
        """As the local engine; ``train.clip`` clips the units' gradients and not the noisy sum."""
        unclipped = dataclasses.replace(train, clip=0.0)
        super().start(parameters, unclipped, total_steps, keep_moments=keep_moments, keep_schedule=keep_schedule)
        self._detach()
        if self._module is None or not self._parameters:
            return
        way, why = choose_way(
            self._module,
            self._parameters,
            asked=self.config.per_unit,
            grouped=self.config.unit == "subject",
            autocast=self._autocast is not None,
            rows=train.micro_batch or train.batch_size,
        )
        self._clipper = Clipper(self._module, self._parameters, train.clip, way)
        self._facts |= {"per_unit": way, "because": why}

    def finish(self) -> None:
        """Take the hooks off the module, and write down what was spent and what follows."""
        self._detach()
        if "planned" in self._facts:
            self._write("privacy", self.facts)

    def _detach(self) -> None:
        if self._clipper is not None:
            self._clipper.close()
            self._clipper = None

    @property
    def facts(self) -> dict[str, Any]:
        """Unit, noise, clipping norm, delta, what was spent, and epsilon by it (None: nothing is guaranteed)."""
        facts = self._facts | {"spent": [list(noisy) for noisy in self._spent.history]}
        return facts | {"epsilon": epsilon_now(facts)}

    def _write(self, kind: str, facts: dict[str, Any]) -> None:
        if self._directory is not None:
            self._directory.event(kind, **facts)
            self._directory.write("run.json", (self._directory.read("run.json") or {}) | {"privacy": facts})

    # --- one step ---------------------------------------------------------------------------------------------------
    def batches(self, strategy: Strategy) -> Iterable[Batch]:
        """Poisson batches; replaces the shuffled epochs of other engines."""
        if "planned" not in self._facts:
            self.admit(strategy)
        run = strategy.run
        stage, train = run.position.stage, strategy.train_config(run.position.stage)
        self._units = units_of(strategy, stage, self.config.unit)  # type: ignore[arg-type]
        records = len(self._units.of)
        self._rate = rate_of(strategy, records)
        self._expected = self._rate * records
        self._write("privacy_plan", self._facts)
        return PoissonBatches(
            strategy.step_loader().source,
            self._units,
            self._rate,
            strategy.stage_steps(stage),
            stage=stage,
            start=run.position.step,
            draws=self._draws,
            by_length=train.group_by_length and train.micro_batch > 0,
        )

    def rows(self, batch: Batch, size: int) -> list[Tensor]:
        """Micro-batches; in a loop the rows of one unit each.

        Processes are dealt units, so that all records of a subject are clipped as one. All get equally many pieces, of
        which some may be empty.
        """
        world = self.group.world
        if self._clipper is None or self._units is None:
            return super().rows(batch, size)
        units = self._units.of[batch.indices].tolist()
        holder = {unit: i % world for i, unit in enumerate(dict.fromkeys(units))}
        held: list[list[int]] = [[] for _ in range(world)]
        for row, unit in enumerate(units):
            held[holder[unit]].append(row)
        self._clipper.expect([units[row] for row in held[self.group.rank]])
        pieces = [self._pieces(rows, units, size) for rows in held]
        most = max(map(len, pieces))
        return [torch.tensor(own[i] if i < len(own) else [], dtype=torch.long) for i in range(most) for own in pieces]

    def _pieces(self, rows: list[int], units: list[int], size: int) -> list[list[int]]:
        """The rows of one process in pieces of at most ``size`` (0 = no limit), and one without rows if it has none."""
        runs = [rows]
        if self._clipper is not None and self._clipper.way == "loop" and rows:
            runs = [list(run) for _, run in itertools.groupby(rows, key=units.__getitem__)]
        return [
            run[at : at + (size or len(run))]
            for run in runs
            for at in range(0, max(1, len(run)), size or len(run) or 1)
        ]

    def losses(self, strategy: Strategy, part: Batch) -> dict[str, Tensor]:
        """Each example's own loss is kept for :meth:`backward`; what is shown is their mean, 0 of none."""
        self._each = None
        if not len(part):
            return {"cross_entropy": torch.zeros((), device=self.device)}
        with self._clipper.watching() if self._clipper is not None else contextlib.nullcontext():
            each = strategy.example_losses(part)
        self._each = each, part
        return {"cross_entropy": each.detach().mean()}

    def units(self, strategy: Strategy, part: Batch) -> dict[str, float]:
        """Rows: the loss is a mean over examples."""
        return {"*": float(len(part))}

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the clipped gradients of the rows that :meth:`losses` saw last; ``loss`` is only what is shown."""
        if self._each is not None and self._clipper is not None and self._units is not None:
            each, part = self._each
            self._each = None
            self._clipper.add(each, self._units.of[part.indices].tolist())

    def unscale(self) -> None:
        """Turn the clipped sums into noisy means: from here on nothing sees what single units did."""
        if self._clipper is None:
            return
        sigma, clip = self._facts["noise_multiplier"], self._facts["clip"]
        self._spent.step(sigma, self._rate)
        for parameter, total in zip(self._parameters, self._clipper.take(), strict=True):
            noisy = torch.zeros_like(parameter)
            if sigma and self.is_main:
                noisy = self._draws.noise(parameter, sigma * clip)
            if total is not None:
                noisy += total
            if self.group.world > 1:
                dist.all_reduce(noisy)
            parameter.grad = noisy.div_(self._expected)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The local engine's, and what was spent; no generator: a resumed run draws new noise."""
        return super().state_dict() | {"spent": self._spent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back; what was spent since is in the directory.

        Raises:
            CheckpointError: the directory says that less was spent.
        """
        super().load_state_dict(state)
        self._spent.load_state_dict(state["spent"])


_COUPLES = "It mixes the examples of a batch, so no gradient is one example's; take another, or freeze the backbone"
_KEEPS = "with running statistics, which would be saved without noise; set track_running_stats=False in it"


def _trained_modules(module: nn.Module) -> list[nn.Module]:
    """Those in training mode once it trains, whatever mode it is in now; a frozen part of it never is."""
    modes = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        return [m for m in module.modules() if m.training]
    finally:
        for m, mode in modes:
            m.training = mode


def _built_with_batch_norm(strategy: Strategy) -> bool:
    """Whether a built-in architecture would train batch normalisation; others are looked at when they are loaded."""
    from clkit import build
    from clkit.models.resolve import architectures
    from clkit.models.seeding import seeded

    config, shape = strategy.run.config.model, build.input_shape(strategy.run.tasks)
    if config.freeze_backbone or shape is None or config.name not in architectures:
        return False
    generator = torch.Generator().manual_seed(0)
    with seeded(generator):
        backbone: nn.Module = architectures.get(config.name)(config, shape, generator)
    return any(isinstance(m, _BatchNorm) for m in backbone.modules())
