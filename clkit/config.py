"""The run configuration: every option, its default, its range and its help, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def opt(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    path: bool | None = None,
) -> Any:
    """A dataclass field with its help and its range (``min``/``max`` inclusive, ``above`` exclusive).

    ``default`` is a value, or something to call for one (a dataclass of options). With ``path`` the value names a file
    or folder, and is made absolute before it is written into a run's directory.
    """
    meta = {"help": help, "min": min, "max": max, "above": above, "choices": choices, "path": path}
    meta = {k: v for k, v in meta.items() if v is not None}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=meta)
    if callable(default):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class LoraConfig:
    """A LoRA adapter on the model (through peft); without one all weights are trained."""

    r: int | None = opt(None, "rank; 0 = no adapter, null = 16 for language models and none for classifiers", min=0)
    alpha: float = opt(32.0, "scale; the update is alpha / r * B @ A", above=0)
    dropout: float = opt(0.0, "dropout on the adapter's input", min=0, max=0.99)
    target_modules: list[str] = opt(["all-linear"], "module names, or all-linear")


@dataclass
class ModelConfig:
    """Which model, and how it is loaded."""

    name: str = opt("smollm2-135m", "alias, hub id, directory, .gguf file or built-in architecture (clkit ls models)")
    dtype: str = opt(
        "auto",
        "weights' type; auto = bfloat16 where the hardware is fast at it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    lora: LoraConfig = opt(LoraConfig, "LoRA adapter")
    prompt: str = opt(
        "auto",
        "how a prompt is shown to a language model: its chat template, or plain text; auto = chat if it has one",
        choices=("auto", "chat", "plain"),
    )
    max_length: int = opt(
        512,
        "longest example in tokens, at most those that the model has learned positions for; a longer prompt loses its "
        "beginning, never the answer",
        min=8,
    )
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass to save memory")
    freeze_backbone: bool = opt(False, "train only the classification head; features are computed once")
    pooling: str = opt("mean", "how an encoder's tokens become one vector", choices=("mean", "cls"))
    hidden: list[int] = opt([256], "widths of the hidden layers of `mlp`")


@dataclass
class ReplayConfig:
    """Rehearsal of earlier tasks' examples; works under every strategy."""

    size: int = opt(0, "examples in the buffer; 0 = no rehearsal", min=0)
    policy: str = opt(
        "reservoir", "which examples are kept", choices=("reservoir", "class-balanced", "ring", "herding")
    )
    mix: str = opt(
        "auto",
        "batch: draw `ratio` examples beside each new one; auto: with herding shuffle all exemplars in with the new "
        "examples of a task, else as batch",
        choices=("auto", "batch"),
    )
    ratio: float = opt(1.0, "replayed examples per new example, over all batches of a task", above=0, max=16)


@dataclass
class StrategyConfig:
    """Options that every strategy has; a strategy's own dataclass extends it."""

    replay: ReplayConfig = opt(ReplayConfig, "rehearsal buffer")


@dataclass
class TrainConfig:
    """How one task is learned."""

    epochs: int = opt(1, "passes over a task's examples (when `steps` is 0)", min=1)
    steps: int = opt(0, "optimiser steps per task; 0 = by epochs", min=0)
    batch_size: int = opt(8, "new examples per optimiser step, over all processes", min=1)
    micro_batch: int = opt(0, "examples per forward pass; 0 = the whole batch (gradients are accumulated)", min=0)
    optimizer: str = opt("adamw", "optimiser", choices=("adamw", "adam", "sgd"))
    learning_rate: float = opt(5e-4, "peak learning rate", above=0)
    weight_decay: float = opt(0.0, "weight decay (decoupled for adamw)", min=0)
    momentum: float = opt(0.9, "momentum of sgd", min=0, max=1)
    betas: list[float] = opt([0.9, 0.999], "moment decay of adam and adamw")
    schedule: str = opt(
        "constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine", "milestones")
    )
    milestones: list[float] = opt([0.3, 0.6, 0.85], "parts of the steps at which `schedule: milestones` decays", min=0)
    decay: float = opt(0.1, "what the learning rate is multiplied with at each milestone", above=0, max=1)
    warmup: float = opt(0.0, "part of the steps in which the learning rate rises linearly from 0", min=0, max=1)
    schedule_scope: str = opt("task", "restart the schedule with each task, or run it once", choices=("task", "run"))
    reset_optimizer: bool = opt(True, "forget the optimiser's moments at each new task")
    clip: float = opt(1.0, "largest norm of the gradient; 0 = no clipping", min=0)
    augment: str = opt(
        "none",
        "random changes of training images, new in every epoch",
        choices=("none", "crop-flip", "crop-flip-brightness"),
    )
    order: str = opt(
        "shuffle",
        "order of an epoch: shuffle, or record: each record's id decides its place, so that a record more or less "
        "moves only those behind it (what exact_replay needs to go back within a task)",
        choices=("shuffle", "record"),
    )
    group_by_length: bool = opt(True, "put examples of similar length into one batch")


@dataclass
class EvalConfig:
    """How tasks are scored."""

    batch_size: int = opt(64, "most examples in one forward pass", min=1)
    max_batch_tokens: int = opt(8192, "most tokens in one forward pass, padding included", min=64)
    max_new_tokens: int = opt(32, "longest generated answer in tokens", min=1)
    initial: bool = opt(True, "score the untouched model, and each task once before it is learned (forward transfer)")
    every_steps: int = opt(0, "also score all seen tasks every so many steps; 0 = only after each task", min=0)
    also: list[str] = opt(
        [],
        "further metrics of every task, each a matrix of its own (clkit ls metrics); [exact-match, tolerant-match] "
        "splits forgetting into superficial and essential",
    )
    lm_eval: list[str] = opt(
        [],
        "task files of lm-evaluation-harness, or folders of them, that become holdout tasks (general ability)",
    )
    lm_eval_limit: int = opt(0, "the first so many records of each of these tasks; 0 = all", min=0)


@dataclass
class EngineConfig:
    """Options that every engine has."""

    device: str = opt("auto", "auto (GPU if there is one), cpu, cuda or cuda:N")


@dataclass
class CheckpointConfig:
    """How often the state is saved; the same command again resumes."""

    every_steps: int = opt(100, "save every so many optimiser steps; 0 = only between tasks", min=0)
    keep: int = opt(2, "how many checkpoints to keep", min=1)


@dataclass
class TrackingConfig:
    """What is written down while a run goes on."""

    log_every: int = opt(10, "write the loss terms to events.jsonl every so many steps", min=1)
    progress: bool = opt(True, "progress bars, when standard error is a terminal")
    samples: int = opt(3, "records per task whose answers are kept in samples.json; 0 = none", min=0, max=100)
    to: list[str] = opt(
        [],
        "trackers that also get every number of events.jsonl; each needs its package",
        choices=("tensorboard", "wandb", "mlflow"),
    )


@dataclass
class Plugin:
    """A named plug-in (strategy, task source, engine) and its own options."""

    name: str
    config: Any


@dataclass
class RunConfig:
    """One run. ``tasks``, ``strategy`` and ``engine`` are plug-ins, with the options of the one that is named."""

    name: str = opt("", "what the run is called in tables and reports; empty: the last part of output_dir")
    output_dir: str = opt("runs/run", "the run directory")
    seed: int = opt(0, "seed of everything random", min=0, max=2**63 - 1)
    model: ModelConfig = opt(ModelConfig, "model")
    tasks: Plugin = field(default_factory=lambda: Plugin("facts", None))
    strategy: Plugin = field(default_factory=lambda: Plugin("naive", StrategyConfig()))
    engine: Plugin = field(default_factory=lambda: Plugin("local", EngineConfig()))
    train: TrainConfig = opt(TrainConfig, "training")
    eval: EvalConfig = opt(EvalConfig, "scoring")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "checkpoints")
    tracking: TrackingConfig = opt(TrackingConfig, "tracking")
    compare: list[list[str]] = opt([], "lists of key=value overrides; each becomes a run of its own")
