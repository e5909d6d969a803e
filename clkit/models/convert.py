"""Convert GGUF files and pickled state dicts to safetensors, once.

GGUF is converted in a process of its own: it needs several times the model's size in memory, and what transformers and
gguf print on the way goes into ``conversion.log`` beside the result instead of onto the user's terminal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from clkit.errors import ModelError
from clkit.files import file_sha256
from clkit.models.store import Say, cache_root, manifest, obtain

LOG = "conversion.log"


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a Hugging Face directory: float32 safetensors, configuration and tokenizer.

    Quantised values are exact in float32 and not in bfloat16, so float32 is what is kept; loading casts.

    Raises:
        ModelError: the file is damaged, or its architecture is not known to transformers.
    """
    command = [sys.executable, "-m", "clkit.models.convert", str(file.resolve()), str(folder.resolve())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelError(f"{file.name} can't be converted: {lines[-1].strip()}")
    (folder / LOG).write_text(done.stdout, encoding="utf-8")


def cached_gguf(file: Path, say: Say) -> Path:
    """The converted directory of a user's GGUF file, made when the file is used for the first time.

    Raises:
        ModelError: as ``convert_gguf``, or the cache can't be written.
    """
    digest = file_sha256(file)
    target = cache_root() / "gguf" / digest
    if manifest(target) is not None:
        say(f"{file.name}: converted before, {target}")
        return target
    size = file.stat().st_size / 2**20
    say(f"{file.name}: converting {size:.0f} MiB of GGUF to float32 safetensors in {target}, once")

    def make(folder: Path) -> dict[str, str]:
        convert_gguf(file, folder)
        return {"origin": f"gguf:{file.resolve()}", "gguf_sha256": digest}

    return obtain(target, make, say)


def convert_state_dict(file: Path, folder: Path) -> None:
    """Convert a pickled dictionary of tensors (.pth) to ``model.safetensors``; nothing but tensors is unpickled.

    Raises:
        ModelError: the file holds anything else.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    except (RuntimeError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{file.name} can't be converted: {str(error).partition(chr(10))[0]}") from error


def _main(file: Path, folder: Path) -> None:
    """The process that converts: everything it prints is kept by its parent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers marks the model as quantised although its weights are plain floats now; marked, it refuses to be
    # saved and to be trained.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = ""  # GGUF carries a free-text name, which peft would take for a hub id
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
