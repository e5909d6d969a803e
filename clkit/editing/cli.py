"""``clkit edit``: apply edit requests to a model, list what was done, take edits back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clkit.errors import ConfigError, Problem


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
    edit.add_argument("--strategy", help="the method (default: that of the edits in --output, else wise)")
    edit.add_argument("--set", nargs="+", default=[], metavar="key=value", help="options of the method")
    edit.add_argument("--seed", type=int, help="seed of the method (default: that of the edits in --output, else 0)")
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
    _apply(arguments)


def _apply(arguments: Any) -> None:
    from clkit.editing.request import lasting, read_requests
    from clkit.editing.store import held

    records = read_requests(arguments.requests)  # every malformed one is found before the model is loaded
    if arguments.on_conflict == "replace":
        records = lasting(records)
    if _begun(arguments) is None:
        _section(arguments)  # before the directory is made; of edits that are there it is compared with theirs
    with held(arguments.output):  # from before the model is loaded to the report: a second command is refused at once
        _learn(arguments, records)


def _learn(arguments: Any, records: Any) -> None:
    editor = _editor(arguments)
    left = sum(not editor.holds(r) for r in records)
    if not arguments.quiet:
        print(f"{len(records)} requests, {len(records) - left} done already, {left} to do", flush=True)
    done = 0

    def show(entry: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if not arguments.quiet:
            before, after = entry["before"]["prompt"], entry["after"]["prompt"]
            print(
                f"[{done}/{left}] {entry['id']}: {before:.2f} -> {after:.2f}, {entry['memory']}, {entry['seconds']} s",
                flush=True,  # also into a file or a pipe, where an edit would else be seen hours later
            )

    editor.edit(records, on_conflict=arguments.on_conflict, progress=show)
    print(_report(editor, records))


def _section(arguments: Any, made_with: str = "wise") -> Any:
    """The method's section of a configuration, checked.

    Raises:
        ConfigError: the method is unknown or does not edit, or an option is wrong.
    """
    from clkit.editing.store import make_strategy
    from clkit.resolve import merge

    content = {"strategy": {"name": arguments.strategy or made_with}}
    section = merge(content, [f"strategy.{o}" for o in arguments.set])["strategy"]
    make_strategy(section)
    return section


def _editor(arguments: Any) -> Any:
    from clkit.editing.editor import Editor
    from clkit.editing.store import read_edits

    output, model, section, begun = arguments.output, arguments.model, None, _begun(arguments)
    if begun is not None:
        saved = read_edits(begun)
        _check_same(arguments, saved)
        model = model or saved.model["name"]
    else:
        section = _section(arguments)
    options = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    return Editor.load(
        model, section or "wise", seed=arguments.seed or 0, directory=output, device=arguments.device, **options
    )


def _begun(arguments: Any) -> Path | None:
    """The directory of edits that are gone on with: that of the output, or the one that is edited; None = a new one."""
    given = [arguments.output, *([Path(arguments.model)] if arguments.model else [])]
    return next((path for path in given if (path / "edits.json").is_file()), None)


def _check_same(arguments: Any, saved: Any) -> None:
    """Edits are gone on with as they were begun.

    Raises:
        ConfigError: another method, option or seed was asked for.
    """
    from clkit.editing.store import make_strategy

    made, asked = saved.strategy, _section(arguments, saved.strategy["name"])
    problems = []
    if asked["name"] != made["name"]:
        problems.append(Problem("--strategy", f"got {asked['name']}, the edits are by {made['name']}"))
    else:
        wanted = json.loads(json.dumps(asdict(make_strategy(asked)[1].config)))
        problems += [
            Problem(f"--set {key}", f"got {wanted[key]}, the edits are made with {made[key]}")
            for key in asked
            if key in wanted and wanted[key] != made.get(key, wanted[key])
        ]
    if arguments.seed not in (None, saved.seed):
        problems.append(Problem("--seed", f"got {arguments.seed}, the edits are made with {saved.seed}"))
    if problems:
        other = "--output" if saved.path == arguments.output else "--model"
        title = f"{saved.path} holds edits; leave these out to go on with them, or choose another {other}:"
        raise ConfigError.collect(title, problems)


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
    from clkit.editing.store import held

    with held(arguments.output):
        gone = _editor(arguments).rollback(arguments.rollback)
        (arguments.output / FINAL).unlink(missing_ok=True)  # it was another model's
    print(f"removed: {', '.join(gone.removed)}")
    if gone.relearned:
        print(f"learned again without it, in the same memory: {', '.join(gone.relearned)}")
