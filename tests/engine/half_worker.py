"""Do the runs that the argument lists, with a float16 loss scale that overflows at once and doubles every other step.

Says in which types each run kept frozen and trained weights.
"""

import functools
import json
import sys

import torch

from clkit import api, resolve
from clkit.engine.deepspeed import DeepSpeedEngine
from clkit.engine.launch import end

SCALER = functools.partial(torch.amp.GradScaler, init_scale=2.0**19, growth_interval=2)
kept: list[dict[str, list[str]]] = []
prepare = DeepSpeedEngine.prepare


def noting(engine, model):
    prepare(engine, model)
    own = [(p.requires_grad, str(getattr(p, "ds_tensor", p).dtype)) for p in model.module.parameters()]
    kept.append({k: sorted({dtype for t, dtype in own if t == (k == "trained")}) for k in ("frozen", "trained")})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.amp.GradScaler = SCALER
    DeepSpeedEngine.prepare = noting
    for content in json.loads(sys.argv[1]):
        api.run(resolve.validate(content))
    print("FOUND" + json.dumps({"kept": kept}))
    end(0)
