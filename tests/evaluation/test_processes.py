"""Two real processes score exactly what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = """
import json, sys
sys.path[:0] = sys.argv[1], sys.argv[3]
import torch, torch.distributed as dist
from byte_level import byte_tokenizer
from tiny_lm import text_task, tiny_module
from clkit.config import EvalConfig
from clkit.engine.group import TorchGroup, local_group
from clkit.engine.launch import end
from clkit.evaluation.base import evaluate
from clkit.models.causal_lm import CausalLM

torch.set_num_threads(1)
alone = sys.argv[2] == "1"
if alone:
    group = local_group()
else:
    dist.init_process_group("gloo")
    group = TorchGroup()
lm = CausalLM("tiny", tiny_module(), byte_tokenizer())
found = {"gather": group.all_gather({"rank": group.rank, "text": "\\u00fc" * (1 + 5 * group.rank), "none": None})}
for metric in ("option-loglik", "perplexity", "exact-match", "rouge-l"):
    task = text_task(metric, 11)
    options = EvalConfig(batch_size=4, max_new_tokens=4)
    score = evaluate(lm, task, lm.encode(task.eval), metric=metric, options=options, group=group)
    found[metric] = [score.value.hex(), score.n, [(d.id, d.value.hex(), d.prediction) for d in score.details]]
one = text_task("perplexity", 1)  # fewer batches than processes
found["one"] = evaluate(lm, one, lm.encode(one.eval), metric="perplexity", group=group).value.hex()
print("FOUND" + json.dumps(found))
end(0)
"""


def start(rank: int, world: int, port: int) -> subprocess.Popen:
    env = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-c", WORKER, str(HERE), str(world), str(HERE.parent)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(world: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(rank, world, port) for rank in range(world)]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        found.append(json.loads(out.partition("FOUND")[2]))
    return found


@pytest.mark.slow
def test_two_processes_score_to_the_last_bit_what_one_does():
    (alone,), (first, second) = results(1), results(2)
    assert alone.pop("gather") == [{"rank": 0, "text": "\u00fc", "none": None}]
    gathered = first.pop("gather")
    assert gathered == second.pop("gather")
    assert [g["rank"] for g in gathered] == [0, 1] and gathered[1]["text"] == "\u00fc" * 6
    assert first == alone and second == alone
