"""A generative adversarial network (GAN) on handwritten digits: a loop of one's own, with two models.

distrib launch --processes 2 gan.py [KEY=VALUE]...     in the folder examples/
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distrib

NOISE, RATE = 16, 0.002


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


def loss_of(scores: Tensor, real: int) -> distrib.Loss:
    """How surprised the critic is: the first `real` scores are of pictures that are real."""
    wanted = (torch.arange(len(scores), device=scores.device) < real).float()[:, None]
    return distrib.Loss(F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum"), len(scores))


def main() -> None:
    config = distrib.Config.load("gan.yaml", sys.argv[1:])
    torch.manual_seed(config.seed)
    models = {"generator": generator(), "critic": critic()}
    pictures = TensorDataset(torch.tensor(load_digits().data / 16, dtype=torch.float32))
    with distrib.OwnLoop(config, pictures, models) as loop:
        g, c = loop.engines["generator"], loop.engines["critic"]
        for window in loop:
            for index, (real,) in enumerate(window):
                with c.microbatch(window, index):  # the critic tells real pictures from the generator's
                    real = c.to_device(real)
                    with torch.no_grad():
                        fake = g.module(torch.randn(len(real), NOISE, device=g.device))
                    loss = loss_of(c.model(torch.cat([real, fake])), real=len(real))
                    if index == 0:
                        c.zero_grad()
                    c.backward(loss)
                with g.microbatch(window, index):  # the generator makes pictures that the critic takes for real
                    fake = g.model(torch.randn(len(real), NOISE, device=g.device))
                    frozen = {name: weight.detach() for name, weight in c.module.named_parameters()}
                    loss = loss_of(functional_call(c.module, frozen, (fake,)), real=len(fake))
                    if index == 0:
                        g.zero_grad()
                    g.backward(loss)
            loop.record(g.step(RATE), critic=c.step(RATE))


if __name__ == "__main__":
    main()
