"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clkit.editing.cli import add_edit_command
from clkit.errors import ClkitError, ConfigError
from clkit.report.command import add_report_command
from clkit.sweep.command import add_sweep_command

_EXIT_INTERRUPTED = 130
_LISTS = ("strategies", "tasks", "metrics", "models", "engines", "configs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user can mend it, 3 a check or a run of a sweep failed, 130
    interrupted.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse gives up on overrides that come after an option
        if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        arguments.run(arguments)
        return 0
    except ClkitError as error:
        if arguments.debug:
            raise
        from clkit.engine.launch import report

        report(error)
        return error.exit_code
    except KeyboardInterrupt as stop:
        text = str(stop) or "interrupted; the same command again goes on from the last checkpoint"
        print(f"clkit: {text}", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `clkit ls | head` does
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clkit",
        description="Continual learning, model editing and unlearning on one sequential-task trainer.",
        epilog="example:\n  clkit run configs/quickstart.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = _add(
        commands,
        "run",
        _run,
        "learn the tasks of a configuration; the same command again resumes",
        "clkit run configs/quickstart_digits.yaml train.epochs=5",
    )
    _config_arguments(run)
    run.add_argument("--fresh", action="store_true", help="delete an earlier run in the same directory first")
    run.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine (engine=deepspeed or private)",
    )
    run.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")

    add_sweep_command(commands, _add)

    validate = _add(
        commands,
        "validate",
        _validate,
        "check a configuration and say what its run would do",
        "clkit validate configs/text_sequence.yaml",
    )
    _config_arguments(validate)

    capacity = _add(
        commands,
        "plan",
        _plan,
        "estimate memory on several GPUs and name the cheapest ZeRO stage that fits",
        "clkit plan configs/deepspeed/lora_8_gpus.yaml --gpus 8 --gpu-memory 80GiB",
    )
    _config_arguments(capacity)
    capacity.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    capacity.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of each (default: %(default)s)")

    evaluate = _add(
        commands,
        "eval",
        _eval,
        "score the model of a run on its tasks, or on other files",
        "clkit eval runs/quickstart/naive --tasks my_test.jsonl",
    )
    evaluate.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        metavar="FILE",
        help="text files (JSONL, CSV, parquet), or folders with a test file, to score instead of the run's tasks",
    )
    evaluate.add_argument("--metric", help="the score for --tasks (default: by the records)")

    listing = _add(commands, "ls", _ls, "list what there is, a line each", "clkit ls strategies")
    listing.add_argument("what", nargs="?", choices=_LISTS, help="default: everything")

    copy = _add(commands, "cp", _cp, "copy a shipped configuration to start from", "clkit cp quickstart my_config.yaml")
    copy.add_argument("name", help="a name from `clkit ls configs`")
    copy.add_argument("target", type=Path, nargs="?", help="a new file (default: NAME.yaml here)")

    export = _add(
        commands,
        "export",
        _export,
        "write the model of a run as a plain Hugging Face or PEFT directory",
        "clkit export runs/quickstart/replay my_adapter",
    )
    export.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")
    export.add_argument("target", type=Path, nargs="?", help="a new directory")
    export.add_argument("--push-to-hub", metavar="NAME", help="upload it to this Hugging Face repository")
    export.add_argument("--public", action="store_true", help="make a new repository public (default: private)")

    add_edit_command(commands, _add)

    add_report_command(commands, _add)

    unlearn = _add(
        commands,
        "unlearn",
        _unlearn,
        "train without the records that deletion requests name, and certify it",
        "clkit unlearn --run runs/quickstart/naive --request request.json --plan",
    )
    unlearn.add_argument("--run", metavar="RUN", dest="run_dir", type=Path, help="the finished run that learned them")
    unlearn.add_argument("--request", metavar="FILE", type=Path, help="requests, JSON or JSON Lines")
    unlearn.add_argument("--method", default="retrain", help="how (default: %(default)s; --plan says which there are)")
    unlearn.add_argument("--set", nargs="+", default=[], metavar="key=value", help="options of the method")
    unlearn.add_argument("--plan", action="store_true", help="only say what each method would do, cost and guarantee")
    for flag, dest, value, what in (
        ("utility-loss", "utility", "LOSS", "gate: largest loss of the mean final score"),
        ("membership", "membership", "AUC", "gate: largest AUC of membership inference on the forgotten records"),
        ("extraction", "extraction", "SHARE", "gate: largest part of forgotten answers given away beyond unseen ones"),
    ):
        unlearn.add_argument(f"--max-{flag}", dest=f"max_{dest}", type=float, metavar=value, help=what)
    similar = unlearn.add_mutually_exclusive_group()
    for decision, what in (("include", "forget too"), ("keep", "keep")):
        flag, text = f"--{decision}-near-duplicates", f"{what} the retained records that say nearly the same"
        similar.add_argument(flag, dest="decision", action="store_const", const=decision, help=text)
    unlearn.add_argument("--purge", action="store_true", help="then delete the old run's checkpoints and export")
    unlearn.add_argument("--verify", metavar="CERTIFICATE", type=Path, help="check a certificate again, nothing else")
    unlearn.add_argument("--sign-with", metavar="KEYFILE", type=Path, help="sign the certificate (clkit[signing])")
    unlearn.add_argument("--signed-by", metavar="PUBLICKEY", help="with --verify: the key that must have signed it")
    unlearn.add_argument("--new-key", metavar="KEYFILE", type=Path, help="make a key to sign with, nothing else")
    return parser


def _add(commands: Any, name: str, function: Callable[[Any], None], help: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=function)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options to change, such as train.epochs=3 or strategy=replay"
    )


def _version() -> str:
    from clkit import __version__

    return f"clkit {__version__}"


def _load(arguments: Any) -> tuple[Any, list[Any]]:
    """The configuration, and the runs that it stands for."""
    from clkit import api, resolve

    # ${seed} stands for the seed of each run, which an entry of `compare` may set.
    content = resolve.read(arguments.config, arguments.overrides, interpolate=False)
    changed = [o.partition("=")[0] for o in arguments.overrides]
    plain = resolve.merge(content, (), origin=arguments.config)
    config = resolve.validate(plain, origin=arguments.config, overridden=changed)
    return config, api.expand(config, content, arguments.overrides)


def _run(arguments: Any) -> None:
    from clkit import api
    from clkit.engine import launch
    from clkit.progress import Progress
    from clkit.report import write_report
    from clkit.result import compare_text

    base, configs = _load(arguments)
    if _launched(arguments, configs):
        return
    main = launch.rank() == 0
    if len(configs) > 1:  # the last one must not fail after the others have run for hours
        api.check(configs)
    results = []
    for config in configs:
        progress = Progress(enabled=main and not arguments.quiet, bars=config.tracking.progress)
        progress.say(f"== {config.name}: {config.strategy.name} in {config.output_dir}")
        result = api.run(config, fresh=arguments.fresh, progress=progress)
        if not main:
            continue
        write_report([result], Path(config.output_dir) / "report.html")
        print(f"\n{result.name}\n{result.summary()}\n")
        results.append(result)
        report = Path(config.output_dir) / "report.html"
    if not main:
        return
    if len(results) > 1:
        report = Path(base.output_dir) / "report.html"
        write_report(results, report)
        print(compare_text(results) + "\n")
    print(f"Report: {report}")


def _launched(arguments: Any, configs: Sequence[Any]) -> bool:
    """Start the processes that --num-processes asks for; True when they have done the work.

    Raises:
        ConfigError: the number is wrong, or the engine is one for a single process.
    """
    from clkit.engine import ENGINES, launch

    count = arguments.num_processes
    if count < 1:
        raise ConfigError(f"--num-processes: got {count}, expected at least 1")
    if launch.running():
        launch.quiet()
        if count not in (1, launch.world()):
            raise ConfigError(f"--num-processes: got {count}, but the launcher started {launch.world()}; drop one")
    alone = [c.name for c in configs if not ENGINES.get(c.engine.name).several]
    if alone and max(count, launch.world()) > 1:
        raise ConfigError(
            f"run '{alone[0]}': its engine is a single process; set engine=deepspeed (or private) for several"
        )
    if count == 1 or launch.running():
        return False
    flags = [name for name, on in (("--fresh", arguments.fresh), ("--quiet", arguments.quiet)) if on]
    launch.start(count, ["run", arguments.config, *arguments.overrides, *flags, *(["--debug"] * arguments.debug)])
    return True


def _validate(arguments: Any) -> None:
    from clkit import api
    from clkit.plan import describe

    configs = _load(arguments)[1]
    if len(configs) > 1:
        api.check(configs)
    for config in configs:
        print(describe(config) + "\n")


def _plan(arguments: Any) -> None:
    from clkit import capacity

    memory = capacity.parse_size(arguments.gpu_memory)
    for config in _load(arguments)[1]:
        print(capacity.plan(config, arguments.gpus, memory) + "\n")


def _eval(arguments: Any) -> None:
    from clkit import api
    from clkit.result import score_table
    from clkit.tasks.jsonl import to_score

    if arguments.metric and not arguments.tasks:
        raise ConfigError("--metric: is for the files of --tasks; the run's own tasks keep their metric. Give --tasks.")
    with api.open_run(arguments.run_dir) as trainer:
        _tell_unfinished(trainer)
        tasks = trainer.scored
        if arguments.tasks:
            tasks = to_score(arguments.tasks, arguments.metric or "auto", "--tasks")
        with trainer.serving():
            print(score_table([trainer.score_task(task) for task in tasks], [task.name for task in tasks]))


def _ls(arguments: Any) -> None:
    from clkit import listing

    for what in [arguments.what] if arguments.what else _LISTS:
        entries = listing.entries(what)
        if not arguments.what:
            print(f"{what}:")
        width = max((len(name) for name, _ in entries), default=0)
        indent = "" if arguments.what else "  "
        for name, line in entries:
            print(f"{indent}{name:<{width}}  {line}")


def _cp(arguments: Any) -> None:
    from clkit.listing import shipped

    known = shipped()
    source = known.get(arguments.name.removesuffix(".yaml"))
    if source is None:
        from clkit.errors import did_you_mean

        raise ConfigError(
            f"no configuration '{arguments.name}' is shipped.{did_you_mean(arguments.name, known)} "
            f"There are: {', '.join(known)}"
        )
    target = arguments.target or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another name")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such directory")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target}: edit it, then `clkit run {target}`")


def _export(arguments: Any) -> None:
    import tempfile

    from clkit import api
    from clkit.models.hub import push

    if arguments.target is None and arguments.push_to_hub is None:
        raise ConfigError("clkit export: give a new directory, --push-to-hub NAME, or both")
    if arguments.target is not None and arguments.target.exists():
        raise ConfigError(f"{arguments.target}: exists already; choose another name")
    with tempfile.TemporaryDirectory() as temporary, api.open_run(arguments.run_dir) as trainer:
        _tell_unfinished(trainer)
        target = arguments.target or Path(temporary) / "export"
        snippet = trainer.export(target)
        if arguments.push_to_hub is None:
            print(snippet)
        else:
            print(push(target, arguments.push_to_hub, public=arguments.public))


def _tell_unfinished(trainer: Any) -> None:
    """Say on standard error that a run has not learned all its tasks, where that is so."""
    if trainer.position.stage < len(trainer.tasks):
        print(
            f"{trainer.directory.path}: not finished; this is its model at {trainer.place()}",
            file=sys.stderr,
            flush=True,
        )


def _unlearn(arguments: Any) -> None:
    from clkit.unlearning.command import unlearn

    unlearn(arguments)


def script() -> NoReturn:
    """The program: as :func:`main`, but one of several processes ends without taking Python down."""
    from clkit.engine.launch import end

    end(main())


if __name__ == "__main__":
    script()
