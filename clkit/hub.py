"""Upload an export to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path

from clkit.errors import ModelError


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
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Export by clkit")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"--push-to-hub {name}: not uploaded ({reason}). Check the name (user/repository), the network and "
            "the token (`hf auth login`, or HF_TOKEN)."
        ) from error
    return str(address)
