"""What every process of tests/test_module_ranks.py runs: torchrun gives it its rank. Results are left in a folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metatele
from metatele.errors import UnsupportedModelError

STEPS, SAMPLES = 4, 12


class Net(nn.Module):
    """Convolutions and an attention; on some ranks another activation, if that is asked for."""

    def __init__(self, odd=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 1)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.odd = odd

    def forward(self, x):
        act = torch.tanh if self.odd and dist.is_initialized() and dist.get_rank() == 1 else F.relu
        x = self.second(act(self.first(x))).flatten(2).mT
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def drawn(step):
    """The whole batch of a step, the same in all processes."""
    random = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 2, 5, 5, generator=random, dtype=torch.float64)
    return x, torch.randn(SAMPLES, 3, generator=random, dtype=torch.float64)


def by_rank():
    return [drawn(2000 + (dist.get_rank() if dist.is_initialized() else 0))]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


# Name: base optimizer, settings, what else is special. "alone": not what one process does, as it differs by rank.
CASES = {
    "ascent": (adam, {"every": 2}, ()),
    "ascent, transport": (
        momentum,
        {"teleport": metatele.GradientNormAscent(steps=3), "every": 2, "state": "transport"},
        (),
    ),
    "an empty share": (adam, {"teleport": metatele.GradientNormAscent(steps=3), "every": 2}, ("empty",)),
    "balance": (adam, {"teleport": metatele.Balance(), "at": [1], "state": "transport"}, ()),
    "rescaling": (momentum, {"teleport": metatele.Rescaling(), "at": [1], "state": "reset"}, ()),
    "random": (adam, {"teleport": metatele.Random(), "every": 2, "state": "transport"}, ("alone",)),
    "batches by rank": (
        adam,
        {
            "teleport": metatele.GradientNormAscent(steps=3),
            "every": 2,
            "batches": by_rank,
            "loss_fn": F.mse_loss,
            "state": "transport",
        },
        ("alone",),
    ),
}


def trained(name, rank=0, count=1, odd=False):
    """Weights after training on this rank's share of each batch, the first moments, and the report."""
    make, settings, special = CASES[name]
    torch.manual_seed(0)
    model = Net(odd).double()
    optimizer = metatele.TeleportOptimizer(make(model.parameters()), model, **settings)
    wrapped = DistributedDataParallel(model) if count > 1 else model
    torch.manual_seed(rank)
    cuts = [0, *(SAMPLES * (i + 1) // (count + 1) for i in range(count - 1)), SAMPLES]  # shares of several sizes
    if "empty" in special:
        cuts = [0, *[SAMPLES] * count]
    mine = slice(cuts[rank], cuts[rank + 1])
    for step in range(STEPS):
        x, y = drawn(step)
        optimizer.zero_grad()
        # DDP averages gradients: these are shares of a mean over all samples.
        (count * F.mse_loss(wrapped(x[mine]), y[mine], reduction="sum") / y.numel()).backward()
        optimizer.step()
    kind = "exp_avg" if make is adam else "momentum_buffer"
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    moments = torch.cat([optimizer.state[p][kind].flatten() for p in model.parameters()])
    report, group = optimizer.report, optimizer.param_groups[0]
    told = report.objective_before, report.objective_after, report.drift, report.moved, report.steps
    return weights, moments, told, (group["teleports"], group["teleports_rolled_back"])


def refusal():
    """What is said where ranks find different symmetries."""
    try:
        trained("rescaling", dist.get_rank(), dist.get_world_size(), odd=True)
    except UnsupportedModelError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    results = {name: trained(name, rank, count) for name in CASES}
    torch.save({"cases": results, "refusal": refusal()}, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
