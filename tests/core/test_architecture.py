"""The rooms keep to their directions, and the command line answers without torch."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "datasets", "omegaconf", "numpy", "avalanche", "rich", "yaml"}


def imports(path: Path) -> set[str]:
    """Absolute modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_framework_imports_no_strategy():
    for path in files("clkit"):
        assert not {m for m in imports(path) if m.startswith(("clkit.strategies", "strategies"))}, path


def test_metrics_import_nothing_but_numpy_and_scipy():
    allowed = set(sys.stdlib_module_names) | {"numpy", "scipy"}
    for path in files("clkit/metrics"):
        wrong = {m for m in imports(path) if m.split(".")[0] not in allowed and not m.startswith("clkit.metrics")}
        assert not wrong, (path, wrong)


def test_the_trainer_knows_models_strategies_and_engines_by_contract_only():
    inside = {m for m in imports(ROOT / "clkit/trainer.py") if m.startswith("clkit.models") and m.count(".") == 2}
    assert inside <= {"clkit.models.base"}
    assert not {
        m for m in imports(ROOT / "clkit/trainer.py") if m.startswith(("transformers", "peft", "deepspeed", "opacus"))
    }


def test_nothing_pickles_and_nothing_asserts_on_users():
    for path in [*files("clkit"), *files("strategies")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            assert ast.unparse(node.func).split(".")[0] not in ("pickle", "dill", "cloudpickle", "shelve"), path
            if ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_no_file_outgrows_its_subject():
    for path in [*files("clkit"), *files("strategies"), *files("tests"), *files("experiments")]:
        assert path.read_text(encoding="utf-8").count("\n") <= 450, path


def test_every_package_directory_is_installed():
    listed = set(
        pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in files("clkit") if p.name == "__init__.py"}
    found |= {
        ".".join(("clkit", *p.parent.relative_to(ROOT).parts)) for p in files("strategies") if p.name == "__init__.py"
    }
    assert listed == found | {"clkit.configs"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["sweep", "--help"], ["ls"], ["ls", "strategies"], ["--version"]]
)
def test_help_and_listings_import_nothing_heavy(arguments):
    code = (
        "import sys, json, contextlib, io\nfrom clkit.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main({arguments!r})\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout.splitlines()[-1])) & HEAVY


def test_what_pages_and_errors_name_is_there_after_import_clkit_alone():
    code = (
        "import sys, clkit\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print([clkit.metrics.continual.summarize, clkit.models.wrap, clkit.tasks.build_tasks, clkit.editing.attach])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_and_listings_take_at_most_ten_times_an_empty_python():
    def seconds(*arguments: str) -> float:
        since = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.perf_counter() - since

    rounds = [
        (seconds("-c", "pass"), seconds("-m", "clkit.cli", "--help"), seconds("-m", "clkit.cli", "ls"))
        for _ in range(7)
    ]
    empty, help_, listing = (statistics.median(r[i] for r in rounds) for i in range(3))
    assert help_ <= 10 * empty and listing <= 10 * empty, (empty, help_, listing)
