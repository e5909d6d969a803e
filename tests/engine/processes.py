"""Start several processes of one job, as torchrun would, and collect what each of them says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def talk(program: str, argument: object, world: int, timeout: float = 400) -> list[dict]:
    """Run ``tests/engine/PROGRAM`` in ``world`` processes; each gets the argument as JSON and prints FOUND and JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        env = environment() | {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(HERE / program), json.dumps(argument)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(outputs)[-6000:]
    return [json.loads(output.partition("FOUND")[2].partition("\n")[0]) for output in outputs]
