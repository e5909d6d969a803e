"""What mkdocs adds to the pages: references made from the code, the methods' READMEs, links that fit the site."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import posixpath
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_OPTIONS = re.compile(r"<!-- options: ([\w-]+) -->")
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code."""
    pages = {"reference/options.md": options(), "reference/metrics.md": metrics(), "reference/python.md": python()}
    for readme in sorted((ROOT / "strategies").glob("*/README.md")):
        pages[f"methods/{readme.parent.name}.md"] = readme.read_text(encoding="utf-8")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links into the repository become links into the site where the page is there, and plain text elsewhere.

    ``<!-- options: NAME -->`` becomes the table of that strategy's own options, made from its dataclass.
    """
    here = page.file.src_uri
    method = re.fullmatch(r"methods/(\w+)\.md", here)
    folder = f"strategies/{method[1]}" if method else posixpath.dirname(f"docs/{here}")

    def fitting(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        readme = re.fullmatch(r"strategies/(\w+)(/README\.md)?", target)
        inside = f"methods/{readme[1]}.md" if readme else target.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            return f"] (`{target}`)" if (ROOT / target).exists() else match[0]
        return f"]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{match[2] or ''})"

    found = _OPTIONS.sub(own_options, _LINK.sub(fitting, markdown))
    return re.sub(r"\[([^\]]+)\] \(`", r"\1 (`", found)


def options() -> str:
    """Every option with its default, range and help, from the dataclasses."""
    from clkit.config import EngineConfig, RunConfig, StrategyConfig
    from clkit.engine import ENGINES
    from clkit.registry import STRATEGIES
    from clkit.tasks import SOURCES

    lines = ["# Options", "", "Made from the dataclasses. `clkit run CONFIG key=value` changes any of them.", ""]
    lines += ["## A run", "", *_table(RunConfig, "")]
    kinds = (("strategy", "Strategies", STRATEGIES), ("tasks", "Task sources", SOURCES), ("engine", "Engines", ENGINES))
    for key, title, registry in kinds:
        lines += ["", f"## {title}", ""]
        common: set[tuple[str, str, str]] = set()
        if key == "strategy":
            common = set(_rows(StrategyConfig, "strategy."))
            lines += ["### every strategy", "", "A rehearsal buffer, off by default. Below stands what differs.", ""]
            lines += [*_table(StrategyConfig, "strategy."), ""]
        for name in sorted(registry.names()):
            plugin = registry.get(name)
            lines += [
                f"### {name}",
                "",
                _first(plugin),
                "",
                *_table(getattr(plugin, "config_class", EngineConfig), f"{key}.", common),
                "",
            ]
    return "\n".join(lines)


def own_options(match: re.Match[str]) -> str:
    """The table of a strategy's options that not every strategy has."""
    from clkit.registry import STRATEGIES

    rows = [r for r in _rows(STRATEGIES.get(match[1]).config_class, "") if not r[0].startswith("replay.")]
    if not rows:
        return "No options of its own."
    return "\n".join(["| option | default | |", "|---|---|---|", *(f"| `{n}` | {d} | {text} |" for n, d, text in rows)])


def _table(cls: type, prefix: str, but: Container[tuple[str, str, str]] = ()) -> list[str]:
    kept = [row for row in _rows(cls, prefix) if row not in but]
    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in kept]
    return ["| option | default | |", "|---|---|---|", *rows] if rows else ["No options of its own."]


def _rows(cls: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(made) and not isinstance(made, type):
            if hasattr(made, "name") and hasattr(made, "config") and type(made).__name__ == "Plugin":
                yield f"{prefix}{field.name}", f"`{made.name}`", "a plug-in; its options stand below"
                continue
            yield from _rows(type(made), f"{prefix}{field.name}.")
            continue
        about = dict(field.metadata)
        limits = [
            f"{word} {about[key]:{'d' if isinstance(about[key], int) else 'g'}}"
            for key, word in (("min", "at least"), ("above", "above"), ("max", "at most"))
            if key in about
        ]
        limits += ["one of " + ", ".join(f"`{c}`" for c in about["choices"])] if "choices" in about else []
        text = str(about.get("help", "")) + (f" ({'; '.join(limits)})" if limits else "")
        default = "required" if made is dataclasses.MISSING else f"`{made!r}`"
        yield f"{prefix}{field.name}", default.replace("|", "\\|"), text.replace("|", "\\|").replace("<", "&lt;")


def metrics() -> str:
    """Every metric of a sequence with its formula, direction and source, and every score of a task."""
    from clkit.evaluation import SCORERS
    from clkit.metrics.continual import DEFINITIONS
    from clkit.metrics.format import FORMAT_DEFINITIONS

    lines = ["# Metrics", "", "`R[k,i]` is the score of task i after learning task k, both from 1; T is the number of"]
    lines += ["tasks. A metric that lacks a score is undefined (`null`), never 0.", "", "## Of a sequence of tasks", ""]
    lines += ["| metric | formula | better | after |", "|---|---|---|---|"]
    lines += [f"| `{k}` | `{d.formula}` | {d.direction} | {d.source} |" for k, d in DEFINITIONS.items()]
    lines += ["", "## Forgetting by form and by content", "", "| part | |", "|---|---|"]
    lines += [f"| `{k}` | {text} |" for k, text in FORMAT_DEFINITIONS.items()]
    lines += ["", "## Scores of one task", "", "| score | | better |", "|---|---|---|"]
    for name in sorted(SCORERS.names()):
        scorer = SCORERS.get(name)
        lines.append(f"| `{name}` | {_first(scorer)} | {'higher' if scorer.higher_is_better else 'lower'} |")
    return "\n".join(lines) + "\n"


def python() -> str:
    """What ``import clkit`` gives, with signatures and docstrings."""
    clkit = importlib.import_module("clkit")
    lines = ["# Python", ""]
    for name in clkit.__all__:
        thing = getattr(clkit, name)
        lines += [f"## clkit.{name}", "", *_entry(thing, f"clkit.{name}")]
        members = vars(thing) if inspect.isclass(thing) and not dataclasses.is_dataclass(thing) else {}
        for member, value in members.items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not member.startswith("_") and inspect.isfunction(function):
                lines += [f"### {name}.{member}", "", *_entry(function, member)]
    return "\n".join(lines) + "\n"


def _entry(thing: Any, name: str) -> list[str]:
    head = [] if inspect.ismodule(thing) else ["```python", f"{name}{inspect.signature(thing)}", "```", ""]
    return [*head, "```text", inspect.getdoc(thing) or "", "```", ""]


def _first(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
