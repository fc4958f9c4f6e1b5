"""Teleport an ordinary loop
============================

Many different weights compute the same function. A *teleport* moves a network from one of
them to another. The outputs stay, and the gradient does not. This tutorial teleports a
model once, then wraps Adam so that it teleports by itself, and then asks the question that
matters: does it help?
"""

# %%
# A network on digits
# -------------------

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import metatele

torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x, y = (torch.tensor(images).float() / 16)[order], torch.tensor(labels)[order]
x_train, y_train, x_test, y_test = x[400:], y[400:], x[:400], y[:400]
loss_of = nn.functional.cross_entropy


def network(seed: int) -> nn.Sequential:
    """A fresh network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def gradient_norm(model: nn.Module) -> float:
    """Of the gradient on 400 training samples."""
    loss = loss_of(model(x_train[:400]), y_train[:400])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).norm().item()


# %%
# Teleport once
# -------------
#
# ``teleport_`` climbs the squared gradient norm, along moves that keep what the network
# computes. With ReLU those are rescalings: multiply what writes a hidden unit by a positive
# number, and divide what reads it by the same. More steps go further.

model = network(seed=0)
with torch.no_grad():
    outputs = model(x_test)
norm = gradient_norm(model)
batch = x_train[:400], y_train[:400]
print(metatele.teleport_(model, *batch, loss_of, objective="grad-norm", steps=50))

# %%
# What stayed: the loss, and every output, on images that the teleport never saw. What
# changed: the gradient.

with torch.no_grad():
    change = (model(x_test) - outputs).abs().max().item()
print(f"largest change of an output on other images: {change:.0e}")
print(f"gradient norm: {norm:.2f} before, {gradient_norm(model):.2f} after")

# %%
# Teleport while training
# -----------------------
#
# ``TeleportOptimizer`` wraps any ``torch.optim`` optimizer. It makes that optimizer's
# steps, and after the chosen ones it teleports on the batch just seen. The loop stays as it
# is. ``at=[0]`` teleports once, after step 0, as the paper does. Here we repeat a move
# after every epoch, so after every 14 steps:
#
# - the default raises the gradient norm, as above;
# - ``Balance`` goes to the point of the orbit where the weights are shortest.
#   ``state="transport"`` gives Adam the memory it would have if it had seen all gradients
#   there.

EPOCHS, SEEDS = 8, 3


def train(seed: int, lr: float, move: str) -> tuple[list[float], list[float]]:
    """Held-out losses and gradient norms, before the first epoch and after each."""
    model, shuffle = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if move == "ascent":
        optimizer = metatele.TeleportOptimizer(optimizer, model, every=14)
    elif move == "balance":
        optimizer = metatele.TeleportOptimizer(
            optimizer, model, metatele.Balance(), every=14, state="transport"
        )
    losses, norms = [], []
    for epoch in range(EPOCHS + 1):
        with torch.no_grad():
            losses.append(loss_of(model(x_test), y_test).item())
        norms.append(gradient_norm(model))
        if epoch < EPOCHS:
            for batch in torch.randperm(len(x_train), generator=shuffle).split(100):
                optimizer.zero_grad()
                loss_of(model(x_train[batch]), y_train[batch]).backward()
                optimizer.step()
    return losses, norms


arms = [
    (1e-3, "none"),
    (1e-3, "ascent"),
    (1e-2, "none"),
    (1e-2, "ascent"),
    (1e-2, "balance"),
]
# For each, [seeds, losses and norms, epochs + 1]
runs = {arm: torch.tensor([train(seed, *arm) for seed in range(SEEDS)]) for arm in arms}
print("Adam's rate   move      held-out loss, mean (least to largest of 3 seeds)")
for (lr, move), values in runs.items():
    last = values[:, 0, -1]
    print(f"{lr:11}   {move:7}   {last.mean():.3f} ({last.min():.3f} to {last.max():.3f})")

# %%
# Does it help?
# -------------
#
# The ascent does what it says: the gradient is longer, on the right. At a rate of 1e-3, too
# low for this network, training is a little faster with it. A better rate does far more. At
# that rate neither move makes a difference beyond that of the seeds.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2), layout="constrained")
styles = {
    (1e-3, "none"): ("#767676", "-"),
    (1e-3, "ascent"): ("#767676", ":"),
    (1e-2, "none"): ("#3a84c4", "-"),
    (1e-2, "ascent"): ("#c1121f", ":"),
    (1e-2, "balance"): ("#69ab4d", "--"),
}
for arm, values in runs.items():
    colour, dashes = styles[arm]
    losses, norms = values.mean(0)
    left.plot(losses, color=colour, linestyle=dashes, linewidth=2.2)
    if arm[0] == 1e-2:
        right.plot(norms, color=colour, linestyle=dashes, linewidth=2.2)
left.text(4.5, 2.0, "Adam, rate 1e-3", color="#767676", fontsize=11)
left.text(3.9, 0.98, "with ascents", color="#767676", fontsize=11)
left.text(0.2, 0.19, "rate 1e-2: alone,\nwith ascents,\nwith balances", fontsize=11)
right.set_xlim(right=EPOCHS + 3.6)
right.set_xticks(range(0, EPOCHS + 1, 2))
words = {"none": "Adam alone", "ascent": "with ascents", "balance": "with balances"}
for move, label in words.items():
    end, colour = runs[1e-2, move][:, 1, -1].mean().item(), styles[1e-2, move][0]
    right.text(EPOCHS + 0.2, end, label, color=colour, fontsize=11, va="center")
for axes, title in ((left, "held-out loss"), (right, "gradient norm, rate 1e-2")):
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
left.set_yscale("log")
left.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
left.minorticks_off()
plt.show()

# %%
# The verdict
# -----------
#
# We measured this on larger networks, with every rate tuned: raising the gradient norm
# helped nowhere that we tried. Balancing a small GPT helped a little. So tune the rate
# first, and measure before you adopt a teleport. The numbers are on :doc:`another page
# </does-it-help>`.
#
# Next: :doc:`teleporting by hand </teleporting>`, with all moves and arguments.
