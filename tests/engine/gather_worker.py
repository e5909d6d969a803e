"""What one process sees of gathered parameters under ZeRO-3; says so as JSON."""

import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

from clkit.config import TrainConfig
from clkit.engine.deepspeed import DeepSpeedEngine
from clkit.engine.launch import end
from clkit.engine.settings import DeepSpeedConfig
from clkit.models import wrap


def main(stage: int, config_file: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # sizes that two processes can't share evenly
    model = wrap(net)
    engine = DeepSpeedEngine(DeepSpeedConfig(device="cpu", zero_stage=stage, config_file=config_file))
    rank = engine.group.rank
    found: dict = {"split": []}
    engine.prepare(model)
    parameters = list(net.parameters())
    engine.start(parameters, TrainConfig(optimizer="sgd", momentum=0.0, learning_rate=0.1, clip=0.0), 10)

    def whole() -> list[float]:
        with engine.gathered(parameters):
            return torch.cat([p.detach().flatten() for p in parameters]).double().tolist()

    x, y = torch.arange(10.0).view(2, 5) / 10, torch.tensor([0, 2])
    found["weights"] = [whole()]
    for _ in range(3):
        engine.backward(F.cross_entropy(net(x), y) / engine.group.world)
        with engine.gathered(parameters):
            engine.add_gradient(parameters[0], parameters[0].detach(), 0.01)
        engine.step()
        found["weights"].append(whole())
        found["split"].append(sum(p.numel() for p in parameters))
    with engine.gathered(parameters[:1], write=True), torch.no_grad():
        parameters[0].fill_(0.5 + rank)  # what the first process writes counts
    found["written"] = whole()[:35]
    engine.backward(0 * net(x).sum())
    engine.step()
    found["after a step of 0"] = whole()[:35]
    try:
        with engine.gathered(parameters), engine.gathered(parameters[:1], write=True):
            pass
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    print("FOUND" + json.dumps(main(*json.loads(sys.argv[1]))))
    end(0)
