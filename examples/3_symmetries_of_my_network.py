"""Which symmetries does my network have?
=========================================

A network has the same outputs at many different weights. ``find_symmetries`` lists the ways
in which yours can move between them. Two uses follow. ``balance_`` repairs a start whose
layers are badly scaled. ``match_`` puts the units of two trained networks in the same
order, so that their weights can be averaged.
"""

# %%
# Find them
# ---------
#
# We take a small convolutional network. ``find_symmetries`` needs the model and an example
# of its inputs.

import copy

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import metatele

torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x = (torch.tensor(images).float() / 16)[order].view(-1, 1, 8, 8)
y = torch.tensor(labels)[order]
x_train, y_train, x_test, y_test = x[400:], y[400:], x[:400], y[:400]
loss_of = nn.functional.cross_entropy


def network(seed: int) -> nn.Sequential:
    """A fresh network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


print(metatele.find_symmetries(network(0), x_train[:8]))

# %%
# Each row is a set of k hidden units, with the parameters that write them and read them.
# Behind a ReLU a channel may be multiplied by a positive number, if what reads it is
# divided by the same. And channels may be put in another order. Each row was verified
# before it was printed: a random move of this kind changed no output.
#
# Other layers allow more. In attention, queries and keys may change basis together, and so
# may values and what reads them: the rows ``GL``.

block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
print(metatele.find_symmetries(block, torch.randn(4, 6, 16)))

# %%
# Repair a badly scaled start
# ---------------------------
#
# We multiply the first layer by 30 and divide the second by 30. The network computes what
# it did before. ``balance_`` goes from there to one canonical point, where the two sides of
# each unit have the same length.


def badly_scaled(model: nn.Sequential) -> nn.Sequential:
    """A copy with the same outputs."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin[0].parameters():
            p *= 30
        twin[3].weight /= 30
    return twin


starts = {
    "as drawn": network(0),
    "badly scaled": badly_scaled(network(0)),
    "repaired": badly_scaled(network(0)),
}
report = metatele.balance_(starts["repaired"], x_train[:8])
for name, model in starts.items():
    norms = " ".join(f"{model[layer].weight.norm().item():6.2f}" for layer in (0, 3, 6))
    loss = loss_of(model(x_test), y_test).item()
    print(f"{name:12}  norms of the weights {norms}   loss {loss:.4f}")
print(f"largest change of an output by the repair: {report.drift:.0e}")

# %%
# The three starts have the same loss. They do not train alike.


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, seed: int
) -> list[float]:
    """Held-out losses, before the first epoch and after each."""
    shuffle, losses = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs + 1):
        with torch.no_grad():
            losses.append(loss_of(model(x_test), y_test).item())
        if epoch < epochs:
            for batch in torch.randperm(len(x_train), generator=shuffle).split(100):
                optimizer.zero_grad()
                loss_of(model(x_train[batch]), y_train[batch]).backward()
                optimizer.step()
    return losses


figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
styles = {
    "as drawn": ("#767676", "-"),
    "badly scaled": ("#c1121f", "-."),
    "repaired": ("#3a84c4", "--"),
}
for name, start in starts.items():
    model = copy.deepcopy(start)
    losses = train(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), epochs=6, seed=0
    )
    axes.plot(losses, color=styles[name][0], linestyle=styles[name][1], linewidth=2.2)
axes.text(4.3, 1.95, "badly scaled", color="#c1121f", fontsize=12)
axes.text(0.5, 0.9, "as drawn", color="#767676", fontsize=12)
axes.text(2.3, 0.9, "repaired by balance_", color="#3a84c4", fontsize=12)
axes.set_yscale("log")
axes.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
axes.minorticks_off()
axes.set_xlabel("epoch")
axes.set_ylabel("held-out loss")
axes.set_title("One function, three starts: SGD with momentum, rate 0.1")
axes.grid(alpha=0.3)
plt.show()

# %%
# A repair is no gain over a good start. It takes the scale of the layers out of the choice
# of a rate: at a rate of 0.01 it is the badly scaled start that trains faster. With the
# best rate for each start, a repair is worth something on some networks and nothing on
# others (:doc:`measured on three </symmetries>`).

for name, start in starts.items():
    model = copy.deepcopy(start)
    losses = train(
        model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), epochs=6, seed=0
    )
    print(f"rate 0.01, {name:12}  held-out loss {losses[-1]:.3f}")

# %%
# Match two trained networks
# --------------------------
#
# Two networks from different seeds are both good. Halfway between their weights lies a bad
# one, because unit 3 of one network has nothing to do with unit 3 of the other. ``match_``
# reorders and rescales the units of one of them to be like those of the other. What it
# computes stays the same.

ours, other = network(0), network(1)
for seed, model in enumerate((ours, other)):
    train(model, metatele.LearnedOptimizer(model), epochs=8, seed=seed)


def test_loss(model: nn.Module) -> torch.Tensor:
    """On the images that were held out."""
    return loss_of(model(x_test), y_test)


before = metatele.loss_barrier(other, ours, test_loss, points=21)
report = metatele.match_(other, ours, x_train[:100])
after = metatele.loss_barrier(other, ours, test_loss, points=21)
print(report)
print(f"barrier: {before.barrier:.3f} before, {after.barrier:.3f} after")

# %%
# The barrier is how far the loss on the straight line rises above its ends.

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.plot(before.at, before.losses, color="#767676", linestyle="--", linewidth=2.2)
axes.plot(after.at, after.losses, color="#3a84c4", linewidth=2.2)
axes.text(0.65, 0.5, "as trained", color="#767676", fontsize=12)
axes.text(0.4, 0.12, "after match_", color="#3a84c4", fontsize=12)
axes.set_xticks([0, 0.5, 1], ["one network", "halfway", "the other"])
axes.set_ylim(bottom=0)
axes.set_ylabel("held-out loss")
axes.set_title("Along the line between two trained networks")
axes.grid(alpha=0.3)
plt.show()

# %%
# Matching does not always work this well. On five pairs of each, the barrier between two
# wide perceptrons or CNNs fell to a tenth or less, between two ResNets to about half, and
# between two small GPTs to two thirds (``results/benchmarks/rebasin.md``).
#
# Next: :doc:`how symmetries are found </symmetries>`, and what is certain about them.
