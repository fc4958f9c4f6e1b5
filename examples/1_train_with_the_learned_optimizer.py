"""Train your network with the learned optimizer
================================================

Train on digits with the learned optimizer and with Adam, and watch what counts: the held-out loss.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import metatele

EPOCHS, BATCH, TEST = 10, 100, 400

images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x, y = (torch.tensor(images).float() / 16)[order], torch.tensor(labels)[order]
train, test = slice(TEST, None), slice(TEST)


def network() -> nn.Sequential:
    """The same fresh network at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


@torch.no_grad()
def loss_on(model: nn.Module, samples: slice) -> float:
    """Mean cross-entropy."""
    return float(nn.functional.cross_entropy(model(x[samples]), y[samples]))


models = {"learned": network(), "Adam": network()}
optimizers = {
    "learned": metatele.LearnedOptimizer(models["learned"]),
    "Adam": torch.optim.Adam(models["Adam"].parameters(), lr=1e-2),
}
print("epoch   " + "   ".join(f"{name:>7} train    test" for name in models))
for epoch in range(1, EPOCHS + 1):
    batches = torch.randperm(len(x) - TEST).split(BATCH)
    for name, model in models.items():
        for batch in batches:
            optimizers[name].zero_grad()
            nn.functional.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
            optimizers[name].step()
    print(f"{epoch:5}   " + "   ".join(f"{loss_on(m, train):13.1e} {loss_on(m, test):7.3f}" for m in models.values()))
