"""Train your network with the learned optimizer
================================================

``metatele.LearnedOptimizer(model)`` is a PyTorch optimizer without a learning rate to
choose. Here it trains a small convolutional network on handwritten digits. Adam trains the
same network beside it, at two rates that people try first. We watch the loss on images that
were held out.
"""

# %%
# Data and a network
# ------------------
#
# The digits come with scikit-learn: 1797 images of 8 by 8 pixels. We hold out 400 of them.

import time

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


def network() -> nn.Sequential:
    """The same fresh network at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


# %%
# An ordinary loop
# ----------------
#
# Nothing in it is special. The learned optimizer takes what it needs from the passes by
# hooks.

EPOCHS, BATCH = 10, 100
STEPS = EPOCHS * len(range(0, len(x_train), BATCH))


@torch.no_grad()
def held_out(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the images that were held out."""
    outputs = model(x_test)
    loss = nn.functional.cross_entropy(outputs, y_test)
    return loss.item(), (outputs.argmax(1) == y_test).float().mean().item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Train, and return the held-out loss before the first epoch and after each."""
    shuffle = torch.Generator().manual_seed(0)
    losses = [held_out(model)[0]]
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x_train), generator=shuffle).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
        losses.append(held_out(model)[0])
    return losses


# %%
# Three optimizers
# ----------------
#
# Only the line that makes the optimizer differs. We know how long the run is, so we say it:
# with ``total_steps`` the learned optimizer cools down by itself over the last 40 % of the
# run. It may be left out. Then steps go on as before, and a scheduler of yours can set
# ``lr``, which is a factor on the learned step.

makers = {
    "learned": lambda model: metatele.LearnedOptimizer(model, total_steps=STEPS),
    "Adam 1e-3": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "Adam 1e-2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
}
curves = {}
print("optimizer   held-out loss   accuracy   seconds")
for name, maker in makers.items():
    model = network()
    optimizer = maker(model)
    begin = time.process_time()
    curves[name] = train(model, optimizer)
    seconds = time.process_time() - begin
    if name == "learned":
        learned = optimizer
    loss, accuracy = held_out(model)
    print(f"{name:9}   {loss:13.3f}   {accuracy:8.3f}   {seconds:7.1f}")

# %%
# The picture
# -----------
#
# Adam at 1e-3 has not arrived, and at 1e-2 it has. That is what choosing a rate is about.
# The learned optimizer takes an epoch to find its step length, and then passes both. This
# is one seed on one small problem. We measured :doc:`64 ordinary situations </field>` and
# :doc:`ten larger tasks </breadth>`.

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
styles = {
    "learned": ("#c1121f", "-"),
    "Adam 1e-3": ("#767676", "--"),
    "Adam 1e-2": ("#3a84c4", "-."),
}
spots = {"learned": (4.1, 0.052), "Adam 1e-3": (4.2, 1.0), "Adam 1e-2": (6.1, 0.125)}
for name, losses in curves.items():
    colour, dashes = styles[name]
    axes.plot(losses, color=colour, linestyle=dashes, linewidth=2.2)
    axes.text(*spots[name], name, color=colour, fontsize=12)
axes.set_yscale("log")
axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
axes.minorticks_off()
axes.set_xlabel("epoch")
axes.set_ylabel("held-out loss")
axes.set_title("A small CNN on digits")
axes.grid(alpha=0.3)
plt.show()

# %%
# What it does with each parameter
# --------------------------------
#
# ``describe()`` prints a row for each parameter: its shape as it is stepped, and how. A
# kernel is a matrix over patches, and a bias is one more column of its weights. Each matrix
# is whitened by the inputs that its layer saw, as K-FAC and Shampoo do.

print(learned.describe())

# %%
# When not to use it
# ------------------
#
# - You have a rate and a schedule that were tuned for just this network. Measure before you
#   change.
# - A step must cost no more than Adam's. It costs more, as the seconds above show.
# - Gradients are sparse: they are refused. Or FSDP has to split the optimizer's memory:
#   ours is not split.
# - Your data set is small and noisy. There the held-out loss can end above Adam's, so watch
#   it.
#
# Next: :doc:`the learned optimizer </learned-optimizer>`, with every argument and what it
# works with.
