"""End while a thread of gloo is freeing a tensor, of which Python's own end often dies."""

import time

import torch
import torch.distributed as dist

from clkit.engine import launch


class Slow(torch.Tensor):
    """Takes long to go, as on a machine with too much to do."""

    def __del__(self) -> None:
        time.sleep(5)


if __name__ == "__main__":
    launch.join(torch.device("cpu"))
    if launch.rank() == 0:
        time.sleep(1)  # so that the second process waits for it in gloo's thread, which then has the tensor alone
    dist.all_reduce(torch.ones(4).as_subclass(Slow), async_op=True)
    dist.barrier()
    print("FOUND{}")
    launch.end(0)
