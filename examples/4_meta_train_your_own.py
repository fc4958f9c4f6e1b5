"""Meta-train an optimizer of your own
=====================================

An optimizer can be trained as a network is: run it on many small problems, and follow the
gradient of the losses that it reaches. This tutorial meta-trains one in a few seconds,
loads it as a PyTorch optimizer, and compares it with standard ones on problems it has not
seen. It is the paper's third method: a recurrent network sets a learning rate and a
teleport at every step.
"""

# %%
# Choose what to train
# --------------------
#
# A configuration is a preset with changes. ``quick`` takes about a minute. We make its
# problems smaller: fit 8 random targets by a network of widths 8, 8, 8. And we stop after
# 128 of them.

import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import nn

import metatele
from metatele.config import preset
from metatele.training.evaluation import evaluate
from metatele.training.report import document, rows
from metatele.training.run import train

torch.set_num_threads(1)
config = preset("quick", method="lr-tele", widths=(8, 8, 8), samples=8, trajectories=128)
c = config.training
print(f"{c.updates} updates, each from {c.batch} trajectories of {c.unroll} steps")

# %%
# Meta-train
# ----------
#
# On the command line the same is
#
# .. code-block:: sh
#
#     metatele train quick --method lr-tele --widths 8,8,8 --samples 8 \
#         --trajectories 128 --out runs/mine
#
# A run folder holds the checkpoint, the state from which the run can be resumed, and every
# logged number.

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name) / "mine"
trainer = train(config, folder, quiet=True)
print(sorted(path.name for path in folder.iterdir() if not path.name.startswith("events")))
print(f"mean log loss on validation problems: {trainer.best:.2f}")

# %%
# Use it
# ------
#
# ``LearnedOptimizer`` takes the folder. These recurrent networks fit one shape, so the
# model has the widths of the meta-training. The loss, too, is the one they know: half the
# sum of squares.

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 8, bias=False), nn.LeakyReLU(0.1), nn.Linear(8, 8, bias=False)
)
x, y = torch.rand(8, 8), torch.rand(8, 8)
with torch.no_grad():
    for p in model.parameters():
        p.uniform_(0, 1)
optimizer = metatele.LearnedOptimizer(model, folder)
for step in range(31):
    optimizer.zero_grad()
    loss = 0.5 * (model(x) - y).square().sum()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}  loss {loss.item():8.2f}")

# %%
# Evaluate it
# -----------
#
# One problem says little. ``evaluate`` takes problems from a stream that training never
# touches. Beside the checkpoint it runs gradient descent at the paper's rate, and four
# standard optimizers. Those are tuned for the last step, on problems of their own. On the
# command line this is ``metatele evaluate runs/mine``.

STEPS = 40
found, task = evaluate([folder], num_trajectories=8, num_steps=STEPS, seed=1, device="cpu")
for row in rows(document(found, task, seed=1, device="cpu")):
    print(f"{row[0]:14}", *(f"{cell:>9}" for cell in row[2:8]))  # six of the steps
temporary.cleanup()

# %%
# The picture
# -----------

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
styles = {
    "LSTM(lr,tele)": ("#c1121f", "-", "meta-trained"),
    "GD": ("#767676", ":", "gradient descent"),
    "Adam": ("#3a84c4", "-.", "Adam, tuned"),
    "L-BFGS": ("#16161d", "--", "L-BFGS, tuned"),
}
for curve in found:
    if curve.name in styles:
        colour, dashes, label = styles[curve.name]
        losses = curve.losses.log().mean(1).exp()  # the geometric mean over problems
        axes.plot(losses, color=colour, linestyle=dashes, linewidth=2.2)
        end = (STEPS + 0.5, losses[-1])
        axes.text(*end, label, color=colour, fontsize=11, va="center")
axes.set_xlim(0, STEPS * 1.35)
axes.set_xticks(range(0, STEPS + 1, 20))
axes.set_yscale("log")
axes.set_xlabel("step")
axes.set_ylabel("loss on new problems")
axes.set_title("A few seconds of meta-training")
axes.grid(alpha=0.3)
plt.show()

# %%
# What to make of it
# ------------------
#
# After a few steps the trained optimizer is ahead of gradient descent and of tuned Adam.
# L-BFGS, which builds a model of the curvature, ends far ahead of it. And it knows problems
# of this shape alone.
#
# Next: :doc:`meta-training </meta-training>`, with resuming, several processes and
# settings. The three methods and their presets are on :doc:`the page of the paper's methods
# </paper-methods>`. An optimizer for any network is trained by another preset, ``general``,
# :doc:`in about 20 minutes </learned-optimizer>`.
