"""Tasks of lm-evaluation-harness as holdout tasks: its YAML files, read from disk, scored by its own code.

A task file can't run code here: ``!function`` is refused, templates are rendered in Jinja's sandbox, and only metrics
of the harness itself are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clkit.errors import ConfigError, DataError, Problem, did_you_mean
from clkit.tasks.base import Task, TextExamples, TextRecord

# What the harness calls the scores that clkit takes from it: means over records, higher is better.
METRICS = {"acc": "lm-eval-acc", "acc_norm": "lm-eval-acc-norm", "exact_match": "lm-eval-exact-match"}
_DEFAULT_METRIC = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
_CODE = ("class", "custom_dataset", "process_docs", "process_results", "use_prompt", "unsafe_code")
_FEWSHOT_SEED = 1234  # the harness's own default


@dataclass(frozen=True)
class HarnessExamples(TextExamples):
    """Records of a task of the harness.

    Attributes:
        harness: the harness's task object.
        requests: what the model is asked for each record: the harness's instances.
    """

    harness: Any = field(default=None, compare=False, repr=False)
    requests: tuple[tuple[Any, ...], ...] = field(default=(), compare=False, repr=False)

    def subset(self, indices: Sequence[int]) -> HarnessExamples:
        """Only the records at ``indices``."""
        kept = {name: tuple(getattr(self, name)[i] for i in indices) for name in ("records", "requests")}
        return dataclasses.replace(self, **kept)


def problems(entries: Sequence[str]) -> list[Problem]:
    """What is wrong with ``eval.lm_eval`` as far as it shows without reading data."""
    if not entries:
        return []
    where = "eval.lm_eval"
    if importlib.util.find_spec("lm_eval") is None:
        return [Problem(where, "needs the package lm-eval: pip install 'clkit[lm-eval]'")]
    found: list[Problem] = []
    names: list[str] = []
    for entry in entries:
        path = Path(entry).expanduser()
        if not path.exists():
            known = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
            found.append(Problem(where, f"'{path}' does not exist.{did_you_mean(path.name, known)}"))
            continue
        files = _files(path)
        if not files:
            found.append(Problem(where, f"'{path}' holds no task file (a .yaml file with a `task:` key)"))
        for file in files:
            try:
                names.append(str(_read(file)["task"]))
            except ConfigError as error:
                found.append(Problem(where, str(error)))
    found += [Problem(where, f"two files make a task named '{n}'") for n in sorted(set(names)) if names.count(n) > 1]
    return found


def holdout_tasks(entries: Sequence[str], limit: int = 0) -> tuple[list[Task], list[Path]]:
    """The tasks of ``eval.lm_eval``, and the files that they were read from.

    Args:
        entries: task files, or folders of task files.
        limit: the first so many records of each; 0 = all.

    Raises:
        ConfigError: the package or a file is missing, or a file is not usable.
        DataError: a task's data can't be loaded.
    """
    if wrong := problems(entries):
        raise ConfigError.collect("eval.lm_eval is not usable:", wrong)
    tasks, sources = [], []
    for file in (f for entry in entries for f in _files(Path(entry).expanduser())):
        content = _read(file)
        tasks.append(_task(file, content, limit))
        sources += [file, *_data_files(content)]
    return tasks, sources


def _files(path: Path) -> list[Path]:
    """The task files behind one entry; in a folder those with a ``task:`` key, in order of their names."""
    if path.is_file():
        return [path]
    return [
        f for f in sorted(path.glob("*.yaml")) if any(line.startswith("task:") for line in f.open(encoding="utf-8"))
    ]


def _read(file: Path, depth: int = 0) -> dict[str, Any]:
    """A task file with what it includes, its data files as absolute paths, and one metric.

    Raises:
        ConfigError: it is no task file, or one that needs more than data.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = getattr(error, "problem", None) or error
        code = "; Python code that a task file names is not run here" if "!function" in str(why) else ""
        raise ConfigError(f"{file}: can't be read ({why}{code})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a task file of lm-evaluation-harness")
    if include := content.pop("include", None):
        if depth == 8:
            raise ConfigError(f"{file}: includes itself")
        content = _read(file.parent / str(include), depth + 1) | content
    if isinstance(kwargs := content.get("dataset_kwargs"), dict) and content.get("dataset_path") in _FILE_FORMATS:
        located = {k: _located(v, file.parent) if k in ("data_files", "data_dir") else v for k, v in kwargs.items()}
        content["dataset_kwargs"] = located
    return content if depth else _checked(file, content)


def _checked(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(content.get("task"), str) or not content.get("dataset_path"):
        raise ConfigError(f"{file}: a task file needs a name (task) and data (dataset_path)")
    if code := [key for key in _CODE if content.get(key)]:
        raise ConfigError(
            f"{file}: {', '.join(code)} would run code, which a task file can't do here; prepare the data"
        )
    kind = content.setdefault("output_type", "generate_until")
    listed = content.get("metric_list") or [{"metric": _DEFAULT_METRIC.get(kind)}]
    usable = [m for m in listed if isinstance(m, dict) and m.get("metric") in METRICS and not m.get("hf_evaluate")]
    if kind not in _DEFAULT_METRIC or not usable:
        raise ConfigError(
            f"{file}: output_type {kind} without a metric that is taken from the harness ({', '.join(METRICS)})"
        )
    chosen = {k: v for k, v in usable[0].items() if k not in ("aggregation", "higher_is_better")}
    content["metric_list"] = [chosen | {"aggregation": "mean", "higher_is_better": True}]
    content["num_fewshot"] = content.get("num_fewshot") or 0
    return content


def _located(value: Any, folder: Path) -> Any:
    """Data files relative to the task file as absolute paths."""
    if isinstance(value, dict):
        return {k: _located(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_located(v, folder) for v in value]
    return value if "://" in str(value) else str((folder / Path(str(value)).expanduser()).resolve())


def _data_files(content: dict[str, Any]) -> list[Path]:
    def leaves(value: Any) -> Iterator[str]:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        if children is None:
            yield str(value)
        else:
            for child in children:
                yield from leaves(child)

    named = (content.get("dataset_kwargs") or {}).get("data_files", [])
    return [path for path in map(Path, leaves(named)) if path.is_file()]


def _task(file: Path, content: dict[str, Any], limit: int) -> Task:
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.api.task import ConfigurableTask

    name, metric = content["task"], METRICS[content["metric_list"][0]["metric"]]
    with quiet():
        _sandbox()
        try:
            harness = ConfigurableTask(config=content)
            harness.set_fewshot_seed(_FEWSHOT_SEED)
            docs = list(harness.eval_docs)[: limit or None]
            examples = _examples(harness, docs, content)
        except (OSError, ValueError, KeyError, TypeError, IndexError, DatasetsError, TemplateError) as error:
            # What a file can have wrong, from its data to its templates.
            raise DataError(f"{file}: {type(error).__name__}: {str(error).strip()}") from error
    return Task(name, TextExamples(()), examples, "text", metric, metadata={"lm_eval": str(file)})


def _examples(harness: Any, docs: list[Any], content: dict[str, Any]) -> HarnessExamples:
    """Each record as clkit shows it, with what the harness asks; examples in the prompt are drawn in the same order."""
    records, requests = [], []
    for i, doc in enumerate(docs):
        context = harness.fewshot_context(doc, num_fewshot=content["num_fewshot"])
        asked = harness.construct_requests(
            doc=doc, ctx=context, metadata=(content["task"], i, content.get("repeats", 1))
        )
        requests.append(tuple(asked) if isinstance(asked, list) else (asked,))
        records.append(_record(harness, doc, f"{content['task']}/{i}"))
    return HarnessExamples(tuple(records), harness, tuple(requests))


def _record(harness: Any, doc: Any, record_id: str) -> TextRecord:
    text, target = harness.doc_to_text(doc), harness.doc_to_target(doc)
    options = None
    if harness.config.doc_to_choice is not None:
        options = tuple(map(str, harness.doc_to_choice(doc)))
        right = text if isinstance(text, int) else target  # the number of the right one, or its text
        target = options[right] if isinstance(right, int) else right
        text = "" if isinstance(text, int) else text
    answer = str(target[0] if isinstance(target, list) and target else target)
    return TextRecord(str(text), answer, record_id, options)


def _sandbox() -> None:
    """Templates of task files can't reach Python's insides."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        safe = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        safe.filters |= {k: f for k, f in utils.env.filters.items() if k not in safe.filters}
        utils.env = safe


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness says only what went wrong."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
