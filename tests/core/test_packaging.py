"""The wheel holds everything, and a package of somebody else adds a strategy without a change here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: str, **environment: str) -> str:
    """Run somewhere else than in the source tree, which Python would otherwise import from."""
    where = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=where, cwd=tempfile.gettempdir(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_imports_framework_and_strategies_and_ships_the_configs(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "runs", ".*_cache", ".venv*")
    )
    call(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    where = call(
        python, "-c", "import clkit, clkit.strategies; print(clkit.__file__, clkit.strategies.__file__)", PYTHONPATH=""
    )
    assert str(tmp_path / "empty") in where.split()[0] and str(tmp_path / "empty") in where.split()[1]
    installed = Path(where.split()[0]).parent
    for folder, target in (("clkit", "."), ("strategies", "strategies"), ("configs", "configs")):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in (".py", ".yaml", ".j2", ".typed") and "__pycache__" not in file.parts:
                assert (installed / target / file.relative_to(ROOT / folder)).is_file(), file
    assert "naive" in call(python, "-m", "clkit.cli", "ls", "strategies", PYTHONPATH="")


@pytest.mark.slow
def test_a_package_of_somebody_else_adds_strategy_source_and_metric_by_entry_point(tmp_path):
    package = tmp_path / "package"
    (package / "theirs").mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "theirs"\nversion = "1"\n'
        '[project.entry-points."clkit.strategies"]\nfrozen = "theirs.plug:Frozen"\n'
        '[project.entry-points."clkit.tasks"]\nblobs = "theirs.plug:Blobs"\n'
        '[project.entry-points."clkit.metrics"]\nalways-half = "theirs.plug:Half"\n'
    )
    (package / "theirs" / "__init__.py").write_text("")
    (package / "theirs" / "plug.py").write_text(
        '"""A strategy that learns nothing, two blobs, and a metric."""\n'
        "from dataclasses import dataclass\nimport torch\n"
        "from clkit.config import opt\nfrom clkit.evaluation.base import Detail, Scorer\nfrom clkit.strategy import Strategy\n"
        "from clkit.tasks.base import LabelledExamples, Task, TaskSequence\nfrom clkit.tasks.source import TaskSource\n"
        "class Frozen(Strategy):\n    def after_backward(self):\n"
        "        for p in self.parameters():\n            p.grad = None\n"
        "@dataclass\nclass Config:\n    points: int = opt(8, 'points per class', min=1)\n"
        "class Blobs(TaskSource):\n    config_class = Config\n"
        "    @classmethod\n    def check(cls, config):\n        return []\n"
        "    @classmethod\n    def build(cls, config, seed):\n"
        "        def task(c):\n"
        "            x = torch.full((config.points, 4), float(c))\n"
        "            e = LabelledExamples(x, torch.full((config.points,), c), [f'{c}/{i}' for i in range(config.points)])\n"
        "            return Task(f'blob{c}', e, e, 'classification', 'always-half', (c,))\n"
        "        return TaskSequence([task(0), task(1)], scenario='class')\n"
        "class Half(Scorer):\n    name = 'always-half'\n    kinds = frozenset({'classification'})\n"
        "    def score(self, scoring, indices):\n        return [Detail(scoring.encoded.ids[i], 0.5) for i in indices]\n"
    )
    site = tmp_path / "site"
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
        str(package),
    )
    found = {"PYTHONPATH": str(site)}
    assert "A strategy that learns nothing" in call(sys.executable, "-m", "clkit.cli", "ls", "strategies", **found)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{name: mlp, hidden: [4], lora: {{r: 0}}}}\n"
        "tasks: {source: blobs, points: 5}\nstrategy: frozen\n"
    )
    assert "0.5000" in call(sys.executable, "-m", "clkit.cli", "run", str(config), "--quiet", **found)
