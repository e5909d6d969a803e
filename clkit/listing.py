"""What there is to choose from, a line each, found without importing anything heavy."""

from __future__ import annotations

from pathlib import Path


def entries(what: str) -> list[tuple[str, str]]:
    """(name, one line) of all strategies, tasks, metrics, models, engines or configs."""
    if what == "configs":
        return [(name, _first_comment(path)) for name, path in shipped().items()]
    if what == "models":
        from clkit.models import describe

        return describe()
    if what == "strategies":
        from clkit.registry import STRATEGIES as REGISTRY
    elif what == "tasks":
        from clkit.tasks import SOURCES as REGISTRY
    elif what == "metrics":
        from clkit.evaluation import SCORERS as REGISTRY
    else:
        from clkit.engine import ENGINES as REGISTRY
    return [(name, REGISTRY.describe(name)) for name in REGISTRY.names()]


def shipped() -> dict[str, Path]:
    """The configurations that come with clkit, by name."""
    here = Path(__file__).parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def _first_comment(path: Path) -> str:
    """The second line of a configuration says what it is for; the first is the command that runs it."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines()[:2] if line.startswith("#")]
    return lines[-1] if lines else ""
