# docs/how-to/ddp.py
"""Two processes train one network on handwritten digits."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import metatele

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
sampler = DistributedSampler(data)
loader = DataLoader(data, 50, sampler=sampler)  # 50 samples for each process: a batch is 100

model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
wrapped = DistributedDataParallel(model)
optimizer = metatele.LearnedOptimizer(model, total_steps=3 * len(loader))

for epoch in range(3):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()  # through the wrapper
        optimizer.step()

mine = torch.cat([p.detach().flatten() for p in model.parameters()])
everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, mine)
if dist.get_rank() == 0:
    x, y = data.tensors
    print(f"training loss {float(nn.functional.cross_entropy(model(x), y).detach()):.3f}")
    print(f"same weights everywhere: {all(torch.equal(mine, other) for other in everyone)}")
dist.destroy_process_group()
