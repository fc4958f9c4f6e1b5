"""Reproduce a table of the paper
================================

Every figure and table of the paper is one command: ``metatele experiments NAME``. It writes
the raw numbers, a table and a figure. This tutorial runs a small one. It asks the question
of the paper's Table 1: do the sharpness and the curvature of a minimum say how well it
generalises?
"""

# %%
# Run it
# ------
#
# The experiment trains networks from different seeds and measures each. The paper has 100
# networks on each of three image sets. We take 30 on scikit-learn's digits, which need no
# file. We call the command from Python, into a folder that goes away.

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib import pyplot as plt

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name) / "table1"
command = "metatele experiments table1 --networks 30 --epochs 40"
subprocess.run(
    [sys.executable, "-m", *command.split(), "--out", folder],
    check=True,
    capture_output=True,
)
print(sorted(path.name for path in folder.iterdir()))

# %%
# Read the table
# --------------
#
# Each row is a quantity, and its correlation with the validation loss over the networks.
#
# - Sharpness φ is the mean loss a little way off the minimum. It goes with the validation
#   loss almost perfectly, and the paper reports high correlations too.
# - So does the training loss L, in the last row. The displacements are small, so φ *is* the
#   training loss but for a rise of less than a thousandth.
# - The column *given L* takes out what both share with L. Then nothing is left of φ's high
#   correlation.
# - Curvature ψ has a wide interval. The paper's correlations of ψ lie between -0.05 and
#   -0.24.

with (folder / "table.csv").open(encoding="utf-8") as file:
    for row in csv.DictReader(file):
        shown = [row["quantity"], row["Pearson with validation loss"], row["95 % interval"]]
        print(
            "{:22} {}   ({})".format(*shown), "  given L:", row["given the training loss"]
        )

# %%
# Read the raw numbers
# --------------------
#
# Tables and figures are made from ``results.json``, which has every number of every
# network, the versions and the times. ``--redraw`` makes them again. Here we draw our own.

results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
temporary.cleanup()
networks = results["arms"]
print(f"{len(networks)} networks {results['widths']} on {results['dataset']}; the first:")
for name, value in networks[0].items():
    print(f"  {name:15} {value:.4g}")

figure, panels = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained", sharey=True)
quantities = {
    "sharpness": "sharpness φ",
    "train_loss": "training loss L",
    "curvature": "curvature ψ",
}
for axes, (key, words) in zip(panels, quantities.items(), strict=True):
    values = [n[key] for n in networks]
    axes.scatter(values, [n["test_loss"] for n in networks], s=26, color="#3a84c4")
    axes.set_xlabel(words)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.3)
panels[0].set_ylabel("validation loss")
figure.suptitle("Each point is a network. φ and L tell the same story.")
plt.show()

# %%
# The real ones
# -------------
#
# This was 30 networks and one data set. The stored results are of 100 networks on each of
# four sets, with intervals, beside the paper's numbers: :doc:`Table 1 and the geometry of
# minima </geometry-and-theory>`.
#
# Next: :doc:`every stored result </results/index>`, with the command that rebuilds it, and
# :doc:`where teleports help, and where not </does-it-help>`.
