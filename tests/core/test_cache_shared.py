"""Rows that several processes need at the same time are computed by one of them."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import torch

from clkit.cache import RowCache, Rows

NAMES = [bytes([i]) * 16 for i in range(40)]


def _work(root: str, log: str, barrier) -> None:
    def compute(positions):
        with Path(log).open("a") as file:
            file.writelines(f"{i}\n" for i in positions.tolist())
        time.sleep(0.5)
        return Rows(positions.double().unsqueeze(1), torch.ones_like(positions))

    barrier.wait()
    found = RowCache(Path(root)).rows({"what": "positions"}, NAMES, compute)
    if found.flat.flatten().tolist() != list(map(float, range(len(NAMES)))):
        raise SystemExit(1)


def test_three_processes_compute_every_row_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log.txt"
    processes = [context.Process(target=_work, args=(str(tmp_path / "cache"), str(log), barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(len(NAMES)))
