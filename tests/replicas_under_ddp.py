"""Training in several gloo processes, for tests of what all ranks have in common. Run by torch.multiprocessing."""

import datetime
import itertools
import os
import pickle

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metatele
from metatele.config import EquivariantConfig, MethodConfig, TaskConfig
from metatele.errors import MetateleError
from metatele.learned import EquivariantOptimizer, MetaOptimizer

BATCH = 24  # of all ranks together
STEPS = 40


def network(seed=0, widths=(6, 9, 7, 4), dtype=torch.float64):
    torch.manual_seed(seed)
    layers = []
    for d, o in itertools.pairwise(widths):
        layers += [nn.Linear(d, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(dtype=torch.float64):
    random = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH * 8, 6, generator=random).to(dtype)
    return x, torch.randint(4, (BATCH * 8,), generator=random)


def optimizer_of(model, opening=False, dtype=torch.float64):
    """A meta-optimizer whose outputs depend on everything it reads, in the model's precision."""
    meta = EquivariantOptimizer(EquivariantConfig(hidden=8, opening=opening, hold=4), 0).to(dtype).requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for p in meta.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=random, dtype=torch.float64).to(dtype))
    return metatele.LearnedOptimizer(model, meta)


def trained(case, rank=0, ranks=1):
    """Weights after :data:`STEPS` steps, of the share of a rank in every batch; ``case`` says what is done."""
    torch.set_num_threads(1)
    model = network()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    if case == "flat":
        task = TaskConfig(widths=(6, 9, 7, 4), samples=BATCH, activation="tanh", bias=True)
        method = MethodConfig(hidden=8, preprocessing="asinh", action="approximate", update_scale=0.1)
        optimizer = metatele.LearnedOptimizer(model, MetaOptimizer(method, task).double(), max_drift=10.0)
    else:
        optimizer = optimizer_of(wrapped if case == "wrapped" else model, opening=case == "opening")
    x, y = data()
    for step in range(STEPS):
        start = 0 if case == "one batch" else BATCH * (step % 8)
        at = slice(start, start + (1 if case == "empty shares" and step % 5 == 4 else BATCH))
        mine_x, mine_y = x[at][rank::ranks], y[at][rank::ranks]
        optimizer.zero_grad()
        if case == "accumulated":
            half = len(mine_x) // 2
            if ranks > 1:
                with wrapped.no_sync():
                    (nn.functional.cross_entropy(wrapped(mine_x[:half]), mine_y[:half]) / 2).backward()
            else:
                (nn.functional.cross_entropy(wrapped(mine_x[:half]), mine_y[:half]) / 2).backward()
            (nn.functional.cross_entropy(wrapped(mine_x[half:]), mine_y[half:]) / 2).backward()
        elif case == "empty shares":  # ranks average, so the sum over all of them is multiplied by their number
            loss = nn.functional.cross_entropy(wrapped(mine_x), mine_y, reduction="sum")
            (loss * ranks / len(x[at])).backward()
        else:
            nn.functional.cross_entropy(wrapped(mine_x), mine_y).backward()
        if case == "evaluations" and (step % 2 == 0 or rank == 0):  # of the bare model, and not on all ranks
            with torch.no_grad():
                model(x[:5])
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def refusals():
    """What the optimizers say of parameters that are split over processes, before and after they were made."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    sharded, later = network(), network()
    fully_shard(sharded, mesh=mesh)
    optimizer = optimizer_of(later)
    for attempt in (
        lambda: optimizer_of(sharded),
        lambda: metatele.TeleportOptimizer(torch.optim.Adam(sharded.parameters()), sharded, at=[0]),
    ):
        try:
            attempt()
        except MetateleError as error:
            found.append(str(error))
    fully_shard(later, mesh=mesh)
    nn.functional.cross_entropy(later(data()[0]), data()[1]).backward()
    try:
        optimizer.step()
    except MetateleError as error:
        found.append(str(error))
    return found


def work(rank, ranks, cases, folder):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        found = {case: trained(case, rank, ranks) for case in cases}
        found["refusals"] = refusals()
    finally:
        dist.destroy_process_group()
    with open(f"{folder}/{ranks}-{rank}.pkl", "wb") as file:
        pickle.dump(found, file)
