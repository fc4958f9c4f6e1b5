"""One pass of a model in several gloo processes, for tests of what all ranks see. Run by torch.multiprocessing."""

import datetime
import os
import pickle

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metatele.network.parts import parts_of
from metatele.network.reduced import Look
from metatele.network.watch import Watch

RANKS = 2


class Model(nn.Module):
    """Look-ups, attention, a convolution, a wide layer; a part that some ranks don't use."""

    def __init__(self):
        super().__init__()
        self.tokens, self.attention = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv, self.wide, self.extra = nn.Conv1d(4, 4, 3, groups=2), nn.Linear(16, 2), nn.Linear(2, 2)

    def forward(self, x, extra):
        h = self.tokens(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        out = self.wide(self.conv(h.mT).flatten(1))
        return out + self.extra(out) if extra else out


def data():
    return torch.randint(7, (12, 6), generator=torch.Generator().manual_seed(1))


def seen(rank=0, ranks=1, extra=True):
    """What is seen of a rank's share of a batch, and the shapes of the parts."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    watch = Watch(wrapped, *parts_of(model))
    watch.attach(model)
    every = frozenset(range(len(watch.parts)))
    watch.wanted = Look(every, every, every, fingerprint=True, dtype=torch.float64, widest=16, rank=3)
    mine = data()[rank::ranks]
    wrapped(mine, extra and rank == 0).square().sum().backward()

    return watch.seen(), watch.fingerprint(), [part.shape for part in watch.parts]


def work(rank, ranks, folder):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timeout)
    try:
        found = seen(rank, ranks), seen(rank, ranks, extra=False)
    finally:
        dist.destroy_process_group()
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(found, file)
