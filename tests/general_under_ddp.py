"""The general family in several gloo processes, for tests of what all ranks have in common. Run by multiprocessing."""

import contextlib
import datetime
import os
import pickle

import torch
import torch.distributed as dist
from general_cases import batch, in_another_basis, make, optimizer_of
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

BATCH = 16  # of all ranks together
STEPS = 40
CASES = {
    "perceptron": "perceptron",
    "grouped convolution": "grouped",
    "language": "language",
    "product": "product",
    "recurrent": "recurrent",
    "one batch, perceptron": "perceptron",
    "one batch, module": "skips",
    "uneven shares": "skips",
    "samples that come again": "skips",
    "not finite on one rank": "skips",
    "closure": "skips",
    "heads in another basis": "language",
}
ALIKE = {  # in what all ranks have in common only: statistics of a batch norm are of each share
    "batch norm": "convolutional",
    "group norm": "normed",
    "transformer": "language",
    "batch norm, views of buckets": "convolutional",
    "transformer, views of buckets": "language",
    "batch norm, accumulated": "convolutional",
    "transformer, accumulated": "language",
    "transformer, accumulated, views of buckets": "language",
}
FEW = 12  # steps of those


def steps_of(case):
    if case.startswith("one batch"):  # others come before and after it
        return [*range(4), *[-1] * 24, *range(4, STEPS - 24)]
    if case == "samples that come again":
        return [step % 4 for step in range(STEPS)]
    return range(STEPS)


def trained(case, rank=0, ranks=1):
    """Weights and what was remembered after :data:`STEPS` steps, of the share of a rank in every batch."""
    torch.set_num_threads(1)
    name = CASES[case]
    model = make(name, dtype=torch.float64)
    if case == "heads in another basis":
        model = in_another_basis(model, batch(name, 0)[0])
    optimizer = optimizer_of(model)
    optimizer.meta.double()
    optimizer.stepper.loaded({}, {})
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    modes = []
    for number, step in enumerate(steps_of(case)):
        x, labels = batch(name, step, BATCH, torch.float64)
        if case == "samples that come again" and number % 8 > 3:  # in another order, so mostly on other ranks
            x, labels = x.roll(1, 0), labels.roll(1, 0)
        uneven = case == "uneven shares"
        mine = slice(0, 5) if uneven and rank == 0 else slice(5, None) if uneven else slice(rank, None, ranks)
        mine = slice(None) if ranks == 1 else mine
        outputs = wrapped(x[mine])
        if case.startswith("one batch"):
            loss = functional.mse_loss(outputs, functional.one_hot(labels[mine], 4).to(outputs))
        elif uneven:
            loss = functional.cross_entropy(outputs, labels[mine], reduction="sum") * ranks / BATCH
        else:
            loss = functional.cross_entropy(outputs, labels[mine])
        if case == "not finite on one rank" and number in (5, 17) and rank == 0:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step((lambda loss=loss: loss) if case == "closure" else None)
        modes.append(optimizer.stepper.repeating)
    group, course = optimizer.param_groups[0], optimizer.stepper.course
    told = {
        "modes": modes,
        "skipped": group["skipped"],
        "heads": optimizer.stepper.heads,
        "epochs": course.epochs,
        "hashes": sorted(course.hashes),
        "start": None if course.start_loss is None else float(course.start_loss),
    }
    return [p.detach().clone() for p in model.parameters()], told


def few(case, rank=0, ranks=1):
    """Weights and how each was stepped after :data:`FEW` steps; accumulated ones are of two passes."""
    torch.manual_seed(0)
    name = ALIKE[case]
    model = GroupNormed() if name == "normed" else make(name)
    optimizer = optimizer_of(model)
    views = "views of buckets" in case
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views) if ranks > 1 else model
    for step in range(FEW):
        x, labels = batch("convolutional" if name == "normed" else name, step, BATCH)
        x, labels = x[rank::ranks], labels[rank::ranks]
        optimizer.zero_grad()
        if "accumulated" in case:
            first = slice(0, len(x) // 2)
            with wrapped.no_sync() if ranks > 1 else contextlib.nullcontext():
                (functional.cross_entropy(wrapped(x[first]), labels[first]) / 2).backward()
            x, labels = x[len(x) // 2 :], labels[len(x) // 2 :]
            (functional.cross_entropy(wrapped(x), labels) / 2).backward()
        else:
            functional.cross_entropy(wrapped(x), labels).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], sorted({row.how for row in optimizer.describe().rows})


class GroupNormed(nn.Sequential):
    """A CNN whose norms are of each sample."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 4),
        )


def work(rank, ranks, folder):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timeout)
    try:
        found = {case: trained(case, rank, ranks) for case in CASES}
        found |= {case: few(case, rank, ranks) for case in ALIKE}
    finally:
        dist.destroy_process_group()
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(found, file)
