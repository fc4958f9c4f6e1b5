"""What every process of tests/test_teleport_ranks.py runs: torchrun gives it its rank. Weights are left in a folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metatele
from metatele.errors import UnsupportedModelError
from metatele.perceptron.activations import LeakyReLU  # noqa: F401  (imported before processes are joined)

STEPS, SAMPLES = 40, 12
whole = nn.functional.mse_loss


def drawn(step):
    """The whole batch of a step, the same in all processes."""
    random = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 6, generator=random, dtype=torch.float64)
    return x, torch.randn(SAMPLES, 3, generator=random, dtype=torch.float64)


def fixed():
    return [drawn(1000), drawn(1001)]


def by_rank():
    return [drawn(2000 + (dist.get_rank() if dist.is_initialized() else 0))]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def ascent(**settings):
    return metatele.GradientNormAscent(action="approximate", steps=3, max_drift=0.1, **settings)


# Name: base optimizer, settings, what else is special. "alone": not what one process does, as it differs by rank.
CASES = {
    "default": (adam, {"every": 5}, ()),
    "ascent, transport": (adam, {"teleport": ascent(), "every": 5, "state": "transport"}, ()),
    "ascent, reset": (adam, {"teleport": ascent(), "every": 10, "state": "reset"}, ()),
    "fixed, clipped": (adam, {"teleport": ascent(lr=0.05), "every": 5}, ("clipped",)),
    "whitening": (momentum, {"teleport": metatele.Whitening(max_drift=0.9, damping=0.3), "every": 10}, ()),
    "rescaling": (momentum, {"teleport": metatele.Rescaling(), "every": 5, "state": "transport"}, ()),
    "random": (adam, {"teleport": metatele.Random(radius=0.05, max_drift=0.9), "every": 5}, ("alone",)),
    "random, transport": (
        adam,
        {"teleport": metatele.Random(radius=0.05, max_drift=0.9), "every": 5, "state": "transport"},
        ("alone",),
    ),
    "conjugate": (momentum, {"teleport": metatele.Whitening(mode="conjugate", inputs=True, refresh=2)}, ()),
    "batches": (adam, {"teleport": ascent(), "every": 10, "batches": fixed, "loss_fn": whole}, ()),
    "batches by rank": (
        adam,
        {"teleport": ascent(), "every": 10, "batches": by_rank, "loss_fn": whole, "state": "reset"},
        ("alone",),
    ),
    "auto, one batch": (
        momentum,
        {"teleport": metatele.GradientNormAscent(action="auto", steps=2), "every": 7},
        ("one",),
    ),
    "an empty share": (adam, {"teleport": ascent(), "every": 5}, ("empty",)),
}


def trained(name, rank=0, count=1):
    """Weights after training on this rank's share of each batch, and the report."""
    make, settings, special = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.LeakyReLU(0.1), nn.Linear(7, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3))
    model.double()
    optimizer = metatele.TeleportOptimizer(make(model.parameters()), model, **settings)
    wrapped = DistributedDataParallel(model) if count > 1 else model
    torch.manual_seed(rank)
    # Shares of several sizes; the last one may have nothing.
    cuts = [0, *(SAMPLES * (i + 1) // (count + 1) for i in range(count - 1)), SAMPLES]
    if "empty" in special:
        cuts = [0, *[SAMPLES * (i + 1) // max(count - 1, 1) for i in range(count - 1)], SAMPLES]
    mine = slice(cuts[rank], cuts[rank + 1])
    for step in range(STEPS):
        x, y = drawn(0 if "one" in special else step)
        if "one" in special:
            x, y = x[:6], y[:6]  # no more samples than inputs
        optimizer.zero_grad()
        # DDP averages gradients: these are shares of a mean over all samples.
        loss = count * nn.functional.mse_loss(wrapped(x[mine]), y[mine], reduction="sum") / y.numel()
        loss.backward()
        if "clipped" in special:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, optimizer.report, optimizer.param_groups[0]["teleports"]


def refusal():
    """What TeleportOptimizer says of a model whose parameters are split over the processes."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(model)
    try:
        metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, at=[0])
    except UnsupportedModelError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    results = {name: trained(name, rank, count) for name in CASES}
    kept = {name: (w, r.objective_before, r.objective_after, number) for name, (w, r, number) in results.items()}
    torch.save({"cases": kept, "refusal": refusal()}, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
