"""The Hugging Face hub: fetch safetensors only, upload exports; a quick, plain failure where it can't be reached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from clkit.errors import ModelError
from clkit.models.store import Say

# No pickled weights, and no Python: nothing that is fetched can run.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
# Exports to other runtimes lie in subfolders, and some models carry their weights twice.
IGNORED = ["*/*", "consolidated*"]
SECONDS = 5.0  # for the first answer; a hub that is slower than that is treated as not there


def offline() -> bool:
    """Whether the user told the Hugging Face libraries to stay off the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(n, "").upper() in {"1", "ON", "YES", "TRUE"} for n in names)


def download(hub_id: str, folder: Path) -> str:
    """Download a model's newest revision into ``folder``; return the revision.

    Raises:
        ModelError: the hub can't be reached, does not have the model, or only has pickled weights.
    """
    revision = _revision(hub_id)
    _snapshot(hub_id, revision=revision, local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return revision


def cached_or_downloaded(hub_id: str, say: Say) -> tuple[Path, str]:
    """The directory of a hub model in the Hugging Face cache, brought up to date where the hub can be reached.

    Returns:
        The directory, and the revision it holds.

    Raises:
        ModelError: the model is neither in the cache nor to be had.
    """
    if offline():
        say(f"{hub_id}: looking in the Hugging Face cache only (HF_HUB_OFFLINE is set)")
    else:
        say(f"{hub_id}: asking the Hugging Face hub")
        try:
            revision = _revision(hub_id)
            return _snapshot(hub_id, revision=revision), revision
        except ModelError as error:
            say(f"{error} Looking in the Hugging Face cache")
            reason = str(error)
    try:
        directory = _snapshot(hub_id, local_files_only=True)
    except ModelError as error:
        start = "" if offline() else f"{reason} "
        raise ModelError(
            f"{start}Model '{hub_id}' is not in the Hugging Face cache either, and there is no directory '{hub_id}'. "
            "Check the name and the network (HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN), or give a local directory."
        ) from error
    return directory, directory.name


def cached_config(hub_id: str) -> Path | None:
    """The directory of a hub model whose configuration is in the cache; touches no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def push(directory: Path, name: str, *, public: bool = False) -> str:
    """Upload a directory as a model repository, which is made when it is not there; returns its address.

    The token is the one of ``hf auth login`` or HF_TOKEN; the hub is HF_ENDPOINT, by default huggingface.co.

    Args:
        directory: an export.
        name: ``user/repository``.
        public: make a new repository public.

    Raises:
        ModelError: the hub refused, or can't be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Export by clkit")
    except _errors() as error:
        raise ModelError(
            f"--push-to-hub {name}: not uploaded ({_first_line(error)}). Check the name (user/repository), the network "
            "and the token (`hf auth login`, or HF_TOKEN)."
        ) from error
    return str(address)


def _errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors are OSErrors; the transport's (httpx, xet) are not."""
    from huggingface_hub import errors

    # Its HTTP library changed between versions, so the base class is taken from where the client imports it.
    client: Any = errors
    return (OSError, ValueError, RuntimeError, client.HTTPError)


def _revision(hub_id: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().model_info(hub_id, timeout=SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelError(f"The hub has no model '{hub_id}' (or it is private: set HF_TOKEN).") from error
    except _errors() as error:
        raise ModelError(f"The hub can't be reached ({_first_line(error)}).") from error
    if not any(f.rfilename.endswith(".safetensors") for f in info.siblings or ()):
        raise ModelError(f"'{hub_id}' has no safetensors weights on the hub; pickled weights are not loaded.")
    return str(info.sha)


def _snapshot(hub_id: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=IGNORED, **options))
    except _errors() as error:
        raise ModelError(f"'{hub_id}' can't be downloaded from the hub ({_first_line(error)}).") from error
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"'{hub_id}' has no safetensors weights in {directory}.")
    return directory


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip().rstrip(".") or type(error).__name__
