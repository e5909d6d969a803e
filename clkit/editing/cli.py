"""``clkit edit``: apply edit requests to a model, list what was done, take edits back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clkit.errors import ConfigError


def add_edit_command(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    edit = add(
        commands,
        "edit",
        _edit,
        "edit facts of a language model; the same command again resumes",
        "clkit edit --model smollm2-135m --requests edits.jsonl --output edited",
    )
    edit.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the edits are kept")
    edit.add_argument("--model", help="the model to edit (default: the one of the edits in --output)")
    edit.add_argument("--requests", type=Path, metavar="FILE", help="edit requests (JSONL, JSON, CSV, parquet)")
    edit.add_argument("--strategy", default="wise", help="the method (default: wise)")
    edit.add_argument("--set", nargs="+", default=[], metavar="key=value", help="options of the method")
    edit.add_argument("--seed", type=int, default=0, help="seed of the method")
    edit.add_argument("--device", help="cpu or cuda (default: a GPU when there is one)")
    edit.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model's weights (default: that of the edits in --output, else float32)",
    )
    edit.add_argument(
        "--on-conflict",
        choices=("error", "replace"),
        default="error",
        help="another answer to a prompt that is edited already: an error, or the last one wins",
    )
    what = edit.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the active edits")
    what.add_argument("--rollback", metavar="ID", help="take back an edit, or all edits of a memory")
    edit.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")


def _edit(arguments: Any) -> None:
    output: Path = arguments.output
    exists = (output / "edits.json").is_file()
    if arguments.list or arguments.rollback:
        if not exists:
            raise ConfigError(f"{output}: there are no edits here")
        _show(output) if arguments.list else _rollback(arguments)
        return
    if arguments.requests is None:
        raise ConfigError("--requests: give a file of edit requests, or --list, or --rollback ID")
    if arguments.model is None and not exists:
        raise ConfigError("--model: give the model to edit")
    _apply(arguments, exists)


def _apply(arguments: Any, exists: bool) -> None:
    from clkit.editing.request import read_requests
    from clkit.resolve import merge

    records = read_requests(arguments.requests)  # every malformed one is found before the model is loaded
    section = merge({"strategy": {"name": arguments.strategy}}, [f"strategy.{o}" for o in arguments.set])["strategy"]
    editor = _editor(arguments, section if not exists else "wise")
    left = sum(r.id not in editor.records for r in records)
    if not arguments.quiet:
        print(f"{len(records)} requests, {len(records) - left} done already, {left} to do")
    done = 0

    def show(entry: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if not arguments.quiet:
            before, after = entry["before"]["prompt"], entry["after"]["prompt"]
            print(
                f"[{done}/{left}] {entry['id']}: {before:.2f} -> {after:.2f}, {entry['memory']}, {entry['seconds']} s"
            )

    editor.edit(records, on_conflict=arguments.on_conflict, progress=show)
    print(_report(editor, records))


def _editor(arguments: Any, section: Any) -> Any:
    from clkit.editing.editor import Editor

    model = arguments.model or _model_of(arguments.output)
    options = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    place = {"directory": arguments.output, "device": arguments.device}
    return Editor.load(model, section, seed=arguments.seed, **place, **options)


def _model_of(output: Path) -> str:
    from clkit.editing.store import read_edits

    return str(read_edits(output).model["name"])


def _report(editor: Any, records: Any) -> str:
    """Scores of the requests on the final model, after every edit; they are kept beside the edits for the report."""
    from clkit.editing.journal import FINAL
    from clkit.editing.judging import standing
    from clkit.files import write_json
    from clkit.metrics.editing import estimate

    names = {"prompt": "reliability", "rephrase": "generalisation", "locality": "locality answer"}
    rows = standing(editor.strategy, editor.model, records)
    write_json(editor.directory / FINAL, {"edits": len(editor.records), "rows": rows})
    lines = [f"{len(editor.records)} active edits in {len(editor.memories())} memories: {editor.directory}"]
    for key, name in names.items():
        values = [row["after"][key] for row in rows if key in row["after"]]
        if values:
            e = estimate(values)
            interval = "" if e.low is None else f" [{e.low:.3f}, {e.high:.3f}]"
            lines.append(f"  {name:<16} {e.mean:.3f}{interval}  (teacher-forced token accuracy, final model, n={e.n})")
    return "\n".join(lines)


def _show(output: Path) -> None:
    from clkit.editing.store import read_edits

    records = read_edits(output).records()
    for record in records.values():
        print(f"{record.id}  {record.prompt} -> {record.target_new}")
    print(f"{len(records)} active edits")


def _rollback(arguments: Any) -> None:
    from clkit.editing.journal import FINAL

    gone = _editor(arguments, "wise").rollback(arguments.rollback)
    (arguments.output / FINAL).unlink(missing_ok=True)  # it was another model's
    print(f"removed: {', '.join(gone.removed)}")
    if gone.relearned:
        print(f"learned again without it, in the same memory: {', '.join(gone.relearned)}")
