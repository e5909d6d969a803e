"""Do the runs that the argument lists, one after another, in this process of however many."""

import json
import sys

import torch

from clkit import api, resolve
from clkit.engine.launch import end

if __name__ == "__main__":
    torch.set_num_threads(1)
    for content in json.loads(sys.argv[1]):
        api.run(resolve.validate(content))
    print("FOUND{}")
    end(0)
