"""Do the runs that the argument lists, one after another, in this process of however many.

What is left of earlier engines is collected before every step, so that nothing of theirs can wait for a later one.
"""

import gc
import json
import sys

import torch

from clkit import api, resolve
from clkit.engine.deepspeed import DeepSpeedEngine
from clkit.engine.launch import end

step = DeepSpeedEngine.step


def collecting(engine):
    gc.collect()
    return step(engine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and need not be looked at again
    DeepSpeedEngine.step = collecting
    for content in json.loads(sys.argv[1]):
        api.run(resolve.validate(content))
    print("FOUND{}")
    end(0)
