"""Weights after steps in which a part of the network has no gradient; says so as JSON, for every stage."""

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import TrainConfig
from clkit.engine.deepspeed import DeepSpeedEngine
from clkit.engine.launch import end
from clkit.engine.settings import DeepSpeedConfig
from clkit.models import wrap

# Whether the middle layer is used, for the passes of each step.
STEPS = [(True, True), (False, False), (True, False), (False, True)]
RATE, PULL = 0.5, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.middle(x) if self.used else x)


def data() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.arange(10.0).view(2, 5) / 10, torch.tensor([0, 2])


def main(stage: int, offload: str) -> list[list[float]]:
    net, x, y = data()
    engine = DeepSpeedEngine(DeepSpeedConfig(device="cpu", zero_stage=stage, offload_optimizer=offload))
    engine.prepare(wrap(net))
    parameters, found = list(net.parameters()), []
    engine.start(parameters, TrainConfig(optimizer="sgd", momentum=0.0, learning_rate=RATE, clip=0.0), 10)
    for passes in STEPS:
        for number, net.used in enumerate(passes, 1):
            loss = F.cross_entropy(net(x), y)
            engine.backward(loss / len(passes) / engine.group.world, last=number == len(passes))
        with engine.gathered(parameters):
            for parameter in parameters:
                engine.add_gradient(parameter, parameter.detach(), PULL)
        engine.step()
        with engine.gathered(parameters):
            found.append(torch.cat([p.detach().flatten() for p in parameters]).double().tolist())
    engine.finish()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("FOUND" + json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
    end(0)
