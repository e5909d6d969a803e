"""Two private steps with secret numbers, one on what was drawn and one on nothing; says as JSON what moved."""

import json
import sys

import torch
from privately import moved, private

from clkit.engine.launch import end


def main(content: dict) -> dict:
    torch.set_num_threads(1)
    trainer = private(content, noise_multiplier=2.0, test_seed=None, train={"clip": 0.5}, model={"hidden": [500]})
    drawn = [batch.indices.tolist() for batch in trainer.loader]
    first = torch.cat([g.flatten() for g in moved(trainer, drawn[0]).values()])
    noise = torch.cat([g.flatten() for g in moved(trainer, []).values()])
    spent = trainer.engine.facts["spent"]
    return {
        "drawn": drawn,
        "moved": first.tolist()[:50],
        "noise": noise.tolist()[:50],
        "std": float(noise.std()),
        "spent": spent,
    }


if __name__ == "__main__":
    print("FOUND" + json.dumps(main(json.loads(sys.argv[1]))))
    end(0)
