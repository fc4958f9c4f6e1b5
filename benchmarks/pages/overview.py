"""The first page of the results: all claims with their verdicts, and what lies in every folder of ``results/``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.pages.model import FAILS, HOLDS, OPEN, PARTLY, Claim, Table, verdict
from benchmarks.pages.render import NOTICE, wrapped

# Folder or file of results/ -> what it holds, page, command that makes it.
_FIG = "metatele experiments"
FOLDERS: dict[str, tuple[str, str, str]] = {
    "theory": ("section 3 by computation", "[claims](#the-claims-of-the-paper)", f"{_FIG} theory"),
    "fig7": ("Figure 7", "[claim](figure-7.md)", f"{_FIG} fig7"),
    "functions": (
        "functions of the plane",
        "[does it help](../does-it-help.md#small-problems)",
        f"{_FIG} functions",
    ),
    "table1-mnist": ("Table 1, Figures 9 and 10", "[claim](table-1-sharpness.md)", f"{_FIG} table1 --dataset mnist"),
    "table1-fashion-mnist": ("the same", "[claim](table-1-curvature.md)", f"{_FIG} table1 --dataset fashion-mnist"),
    "table1-cifar10": ("the same", "[claim](table-1-sharpness.md)", f"{_FIG} table1 --dataset cifar10"),
    "table1-digits": ("the same, on digits", "[claim](table-1-sharpness.md)", f"{_FIG} table1"),
    "fig4-cifar10": ("Figure 4", "[claim](figure-4-curvature.md)", f"{_FIG} fig4 --dataset cifar10"),
    "fig4-cifar10-search": (
        "the same, by line search",
        "[claim](figure-4-curvature.md)",
        f"{_FIG} fig4 --dataset cifar10 --settings search",
    ),
    "fig4-digits": ("the same, on digits", "[claim](figure-4-curvature.md)", f"{_FIG} fig4"),
    "fig4-digits-search": ("the same", "[claim](figure-4-curvature.md)", f"{_FIG} fig4 --settings search"),
    "fig4-digits-text": ("the same", "[claim](figure-4-curvature.md)", f"{_FIG} fig4 --settings text"),
    "fig11-cifar10": ("Figure 11", "[claim](figure-11.md)", f"{_FIG} fig11 --dataset cifar10"),
    "fig11-digits": ("the same, on digits", "[claim](figure-11.md)", f"{_FIG} fig11"),
    "fig5-mnist": ("Figure 5", "[claim](figure-5.md)", f"{_FIG} fig5 --dataset mnist"),
    "fig5-mnist-text": (
        "the same, the text's rates",
        "[claim](figure-5.md)",
        f"{_FIG} fig5 --dataset mnist --settings text",
    ),
    "fig5-fashion-mnist": ("the same", "[claim](figure-5.md)", f"{_FIG} fig5 --dataset fashion-mnist"),
    "fig5-digits": ("the same, on digits", "[claim](figure-5.md)", f"{_FIG} fig5"),
    "fig13-mnist": ("Figure 13", "[claim](figure-13.md)", f"{_FIG} fig13 --runs results/fig5-mnist"),
    "fig12": ("Figure 12", "[claim](figure-12.md)", f"{_FIG} fig12"),
    "optimizers-beyond-digits": (
        "eight optimizers, six ways to teleport, tuned rates",
        "[does it help](../does-it-help.md#every-learning-rate-tuned)",
        f"{_FIG} optimizers-beyond",
    ),
    "fig6": ("Figure 6, the paper's settings", "[claim](figure-6.md)", f"{_FIG} fig6"),
    "fig6-quick": ("the same, preset `quick`", "[claim](figure-6.md)", f"{_FIG} fig6 --preset quick --seeds 5"),
    "fig6-best": ("the same, preset `best`", "[claim](figure-6.md)", f"{_FIG} fig6 --preset best --seeds 5"),
    "transfer": (
        "one learned optimizer on shapes and data mostly new to it",
        "[transfer](../transfer.md#in-the-laboratory)",
        f"{_FIG} transfer",
    ),
    "recording": (
        "what the learned optimizer did in a run on digits, step by step",
        "[how it works](../explanation/how-the-learned-optimizer-works.md#a-real-run)",
        "docs/draw/a_real_run.py",
    ),
    "gpu": ("two runs on an H200", "[speed](../speed.md#on-a-gpu)", "make gpu"),
}
# The same for the files in results/benchmarks, without their ending. The script is benchmarks/NAME.py where none is
# said.
BENCHMARKS: dict[str, tuple[str, str, str]] = {
    "field": ("64 ordinary situations, seeds 0 to 2", "[field](../field.md)", ""),
    "field-seeds-3-5": ("the same, seeds 3 to 5", "[field](../field.md)", "field.py --first-seed 3"),
    "field-evolved": ("the same, with what evolution made", "[field](../field.md)", "field.py --method FOLDER"),
    "evolution": (
        "that meta-training, with its scores",
        "[field](../field.md#results)",
        "metatele train general --minutes 19",
    ),
    "breadth": ("ten tasks beside tuned peers", "[breadth](../breadth.md)", "breadth.py --tune"),
    "full_batch": (
        "twelve small problems on one batch",
        "[does it help](../does-it-help.md#levenberg-marquardt)",
        "",
    ),
    "modules": (
        "teleports of a CNN and a GPT",
        "[does it help](../does-it-help.md#on-a-cnn-and-a-gpt)",
        "",
    ),
    "teleport_field": (
        "what the default move does in ordinary runs",
        "[teleporting](../teleporting.md#around-your-optimizer)",
        "",
    ),
    "teleport": ("cost of a teleport", "[claim](figure-13.md)", ""),
    "repair": ("training from badly scaled points", "[symmetries](../symmetries.md#repairing-a-bad-start)", ""),
    "rebasin": ("the loss between two trained networks", "[symmetries](../symmetries.md#merging-two-networks)", ""),
    "quantise": ("rounding weights", "[symmetries](../symmetries.md#rounding-weights)", ""),
    "symmetries": ("symmetries of well-known networks", "[symmetries](../symmetries.md#well-known-architectures)", ""),
    "heads": ("bases of attention heads", "[teleporting](../teleporting.md#attention-heads)", ""),
    "table1_cnn": ("Table 1 on small CNNs", "[claim](table-1-sharpness.md)", ""),
    "geometry": ("time of φ and ψ", "[geometry](../geometry-and-theory.md)", ""),
    "ablations": (
        "parts of the learned optimizer",
        "[learned optimizer](../learned-optimizer.md#train-a-general-one)",
        "",
    ),
    "optimizer_step": ("time of a step, `transfer`", "[speed](../speed.md#one-step-of-an-optimizer)", ""),
    "optimizer_step-general": (
        "time of a step, the default",
        "[speed](../speed.md#one-step-of-an-optimizer)",
        "optimizer_step.py",
    ),
    "meta_training": ("time of meta-training", "[speed](../speed.md#one-step-of-meta-training)", ""),
    "scaling": ("processes and memory", "[speed](../speed.md#memory-of-a-window)", ""),
    "time_to_quality": ("meta-training to a target", "[speed](../speed.md#time-to-quality)", ""),
    "soak": ("kills, resumes and broken disks", "[meta-training](../meta-training.md#resume)", ""),
}


def index(claims: Sequence[Claim]) -> str:
    """The whole page."""
    outcomes = [(claim, claim.read()) for claim in claims]
    count = Counter(verdict(outcome.checks) for _, outcome in outcomes)
    rows = [[f"[{c.title}]({c.slug}.md)", f"**{verdict(o.checks)}**", o.number] for c, o in outcomes]
    listing = Table("", ["claim", "verdict", "what was measured"], rows, numbers=False).shown()
    stored_rows = [[f"`{name}`", what, f"`{command}`", page] for name, (what, page, command) in FOLDERS.items()] + [
        [f"`benchmarks/{name}`", what, f"`{_script(name, command)}`", page]
        for name, (what, page, command) in BENCHMARKS.items()
    ]
    places = Table("", ["in `results/`", "what", "made by", "page"], stored_rows, numbers=False).shown()
    tree = "\n".join(claim.slug for claim in claims)
    text = f"""# Results

{NOTICE}

Does the paper hold? Each of its {len(claims)} claims has a page, with a verdict, an interval, a figure, and the
command that runs it again. Every number is computed from a stored raw result.

Of {len(claims)} claims, {count[HOLDS]} hold, {count[PARTLY]} hold partly, {count[FAILS]} do not hold here, and
{count[OPEN]} is undecided.

## The claims of the paper

{listing}

Losses are differences with their 95 % intervals, below 0 where the teleport is better.

## How a verdict is made

Each claim is turned into checks, and one rule makes the verdict of them. The checks were written down after the
runs, so they are no preregistration. A check is met if the whole 95 % interval lies on the claimed side. Intervals
are of means over seeds, by Student's t, or of correlations, by Fisher's transformation. Differences are paired by
seed. Where the paper's method has a side effect, such as a reset, the comparison is with that side effect alone.

| verdict | when |
|:--|:--|
| holds | every check that counts is met |
| holds partly | some are |
| undecided | none is, and the paper's own values lie in our intervals: these runs could not have told |
| does not hold here | none is, otherwise |

A check counts if it tests the claim itself, on the paper's data, with an interval where chance plays a part.
Others are shown in brackets, and so are statements that nothing happens, which no interval can show. Where nothing
is true, one check in forty is met by chance. Where a claim is true, small runs can miss it. *Does not hold here*
means that our runs do not show it, not that it is false.

## Beyond the paper

| page | question |
|:--|:--|
| [Field](../field.md) | Is the learned optimizer no worse than Adam where nobody tuned it? |
| [Breadth](../breadth.md) | How does it do beside tuned peers, on ten tasks? |
| [Does it help?](../does-it-help.md) | Should I use teleports or the learned optimizer? |
| [Speed](../speed.md) | What does it cost, on a CPU and on a GPU? |

## Every stored result

Each folder holds raw numbers, a table and a figure. The pages give the whole command, with its data. All but `gpu`
ran on CPUs. Most say their versions and running time.

{places}

One command makes all pages from them. With `--check` it says which page is not what the results give:

```sh
python -m benchmarks.pages --check
```

```{{toctree}}
:hidden:

{tree}
```
"""
    return "\n\n".join(map(wrapped, text.split("\n\n")))


def _script(name: str, command: str) -> str:
    if command.startswith("metatele"):
        return command
    return f"python benchmarks/{command or name + '.py'}"
