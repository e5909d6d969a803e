"""Options of MEMO; the defaults are the published code's."""

from __future__ import annotations

from dataclasses import dataclass

from clkit.config import ReplayConfig, StrategyConfig, opt


@dataclass
class FirstTaskConfig:
    """What is different in the first task, which trains everything from scratch."""

    epochs: int = opt(0, "passes over the first task; 0 = train.epochs", min=0)
    weight_decay: float | None = opt(None, "weight decay of the first task; null = train.weight_decay", min=0)
    milestones: list[float] = opt([], "milestones of the first task; empty = train.milestones", min=0)


@dataclass
class GrowingConfig(StrategyConfig):
    """How a network grows by one block per task, which classifier serves, and what the exemplars may cost."""

    alpha_aux: float = opt(1.0, "weight of the auxiliary loss on the new block's features", min=0)
    zero_columns: bool = opt(False, "old classes start with zero weights for a new block's features, not random ones")
    align: bool = opt(True, "after a task, scale the new classes' weights to the mean norm of the old ones'")
    serve: str = opt(
        "linear", "which classifier is scored and exported; the other is logged", choices=("linear", "nearest-mean")
    )
    budget: float = opt(0.0, "MiB that model and exemplars share; 0 = replay.size exemplars", min=0)
    budget_at: str = opt(
        "end",
        "exemplars that fit beside the model as it will be after the last task, or as it is at each stage",
        choices=("end", "stage"),
    )
    counting: str = opt("paper", "how the budget is counted", choices=("paper", "strict"))
    cache: float = opt(2048.0, "most MiB of features kept in memory while the shared part is frozen; 0 = none", min=0)
    first: FirstTaskConfig = opt(FirstTaskConfig, "the first task")
    replay: ReplayConfig = opt(lambda: ReplayConfig(size=2000, policy="herding"), "exemplars")


@dataclass
class MemoConfig(GrowingConfig):
    """Where the network is cut, and what is frozen."""

    cut: str = opt("", "the first part that is copied for each task; empty = the backbone's own default")
    train_base: bool = opt(
        True, "go on training the shared part after the first task (published: false where it is large)"
    )
    stop_old_gradient: bool = opt(False, "no gradient into the shared part through the old blocks; other mathematics")
