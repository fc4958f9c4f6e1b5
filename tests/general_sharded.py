"""The general family on networks that fully_shard has split, in several gloo processes. Run by multiprocessing."""

import copy
import datetime
import os
import pickle

import torch
import torch.distributed as dist
from general_cases import batch, make, optimizer_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import metatele
from metatele.errors import MetateleError, UnsupportedModelError

BATCH, STEPS = 16, 14
CASES = {
    "perceptron": ("perceptron", "classes"),
    "language": ("language", "classes"),
    "accumulated": ("language", "accumulated"),
    "accumulated, sent once": ("language", "no sync"),
    "one batch": ("skips", "one batch"),
    "resumed": ("skips", "resumed"),
    "frozen and decayed": ("skips", "frozen"),
}


def sharded(model, mesh):
    """The blocks, or the layers, and the rest."""
    blocks = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for module in blocks or [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(case, rank, ranks, mesh):
    """Weights after some steps, whole, and what was told; with a mesh by ``fully_shard``, else by DDP."""
    name, how = CASES[case]
    torch.manual_seed(0)
    model = make(name)
    model = DistributedDataParallel(model) if mesh is None else sharded(model, mesh)
    optimizer = optimizer_of(model, weight_decay=1e-3 if how == "frozen" else 0.0)
    if how == "frozen":
        named = dict(model.named_parameters())
        group = [p for n, p in named.items() if not n.endswith("first.weight")]
        optimizer = optimizer_of(model, params=group, weight_decay=1e-3)
    for step in range(STEPS + 14 * (how == "one batch")):
        x, labels = batch(name, -1 if how == "one batch" else step, BATCH)
        x, labels = x[rank::ranks], labels[rank::ranks]
        if how == "resumed" and step == 9:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_of(model)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        halves = (slice(0, 4), slice(4, None)) if how in ("accumulated", "no sync") else (slice(None),)
        for half in halves:
            if how == "no sync" and mesh is not None:
                model.set_requires_gradient_sync(half.start != 0)
            outputs = model(x[half])
            if how == "one batch":
                loss = functional.mse_loss(outputs, functional.one_hot(labels, 4).to(outputs))
            else:
                loss = functional.cross_entropy(outputs, labels[half]) / len(halves)
            loss.backward()
        optimizer.step()
    rows = sorted((row.name, row.how) for row in optimizer.describe().rows)
    shapes = {
        n: sorted((k, tuple(v.shape)) for k, v in e.items() if k != "step")
        for n, e in optimizer.state_dict()["state"].items()
    }
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    rows = [(row[0].removeprefix("module."), row[1]) for row in rows]
    return [p.detach().clone() for p in whole], (rows, shapes, optimizer.stepper.repeating, optimizer.stepper.heads)


def refusals(mesh):
    """What is said where a model cannot be stepped."""
    found = []
    part = make("perceptron")
    fully_shard(part[0], mesh=mesh)
    whole = fully_shard(make("perceptron"), mesh=mesh)
    for attempt in (
        lambda: optimizer_of(part),
        lambda: metatele.LearnedOptimizer(whole, "transfer"),
        lambda: metatele.TeleportOptimizer(torch.optim.Adam(whole.parameters()), whole, at=[0]),
    ):
        try:
            attempt()
        except UnsupportedModelError as error:
            found.append(str(error))
    late = make("skips")
    optimizer = optimizer_of(late)
    fully_shard(late, mesh=mesh)
    late(batch("skips", 0)[0]).sum().backward()
    try:
        optimizer.step()
    except MetateleError as error:
        found.append(str(error))
    return found


def work(rank, ranks, folder):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timeout)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        found = {c: [trained(c, rank, ranks, m) for m in (mesh, None)] for c in CASES}
        found["refusals"] = refusals(mesh)
    finally:
        dist.destroy_process_group()
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(found, file)
