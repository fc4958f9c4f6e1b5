"""What TeleportOptimizer's default move and its ``state="transport"`` do in ordinary training, held-out loss included.

python benchmarks/teleport_field.py --json results/benchmarks/teleport_field.json
python benchmarks/teleport_field.py --table results/benchmarks/teleport_field.json   # print it again

Two data sets of scikit-learn, a fifth of each held out, batches of 100. About five minutes on one core.

- ``default``: factor of one default teleport on the squared gradient norm, at step 0 and after 100 steps of Adam.
- ``repeated``: Adam with the default move every 10 steps, beside Adam alone, at two rates.
- ``transport``: loss after 200 steps with transported state over that with kept state, four optimizers of Adam's kin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import environment, save  # noqa: E402

import metatele  # noqa: E402
from metatele.command_line import whole_number  # noqa: E402
from metatele.intervals import half_width  # noqa: E402
from metatele.teleport import GradientNormAscent  # noqa: E402

NETWORKS = {
    "ReLU 48-32": ((48, 32), nn.ReLU),
    "ReLU 5 x 32": ((32,) * 5, nn.ReLU),
    "LeakyReLU 3 x 256": ((256,) * 3, nn.LeakyReLU),
    "Tanh 48-32": ((48, 32), nn.Tanh),
    "Tanh 5 x 32": ((32,) * 5, nn.Tanh),
    "SiLU 48-32": ((48, 32), nn.SiLU),
    "Sigmoid 32": ((32,), nn.Sigmoid),
}
SETS = ("digits", "breast_cancer")
KIN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
MOVES = {
    "rescaling": lambda: GradientNormAscent(action="rescaling"),
    "approximate": GradientNormAscent,
}


class Data:
    """A set of scikit-learn, standardised as a whole, and its held-out fifth."""

    def __init__(self, name: str) -> None:
        from sklearn import datasets

        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        inputs, labels = torch.tensor(x).float(), torch.tensor(y).long()
        of = () if name == "digits" else (0,)  # pixels have one scale, the columns of a table their own
        inputs = (inputs - inputs.mean(*of)) / inputs.std(*of)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        held, kept = order[: len(order) // 5], order[len(order) // 5 :]
        self.train, self.held_out = (inputs[kept], labels[kept]), (inputs[held], labels[held])
        self.classes = int(labels.max()) + 1

    def network(self, hidden: Sequence[int], activation: type[nn.Module], seed: int) -> nn.Sequential:
        """A fresh one."""
        torch.manual_seed(seed)
        widths = (self.train[0].shape[1], *hidden, self.classes)
        layers: list[nn.Module] = []
        for d, o in itertools.pairwise(widths):
            layers += [nn.Linear(d, o), activation()]
        return nn.Sequential(*layers[:-1])

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> dict[str, float | None]:
        """Training and held-out loss after some steps; ``None`` where it is not finite."""
        x, y = self.train
        random, done = torch.Generator().manual_seed(seed), 0
        while done < steps:
            for batch in torch.randperm(len(x), generator=random).split(100)[:-1]:
                if done == steps:
                    break
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                done += 1
        return {"train": loss_of(model, self.train), "held_out": loss_of(model, self.held_out)}


@torch.no_grad()
def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> float | None:
    """Cross-entropy."""
    loss = float(nn.functional.cross_entropy(model(data[0]), data[1]))
    return loss if math.isfinite(loss) else None


def default(name: str, data: Data, seeds: int) -> list[dict[str, Any]]:
    """Factors on the squared gradient norm."""
    rows = []
    for (title, (hidden, activation)), step, seed in itertools.product(NETWORKS.items(), (0, 100), range(seeds)):
        model = data.network(hidden, activation, seed)
        base = torch.optim.Adam(model.parameters(), lr=1e-3)
        optimizer = metatele.TeleportOptimizer(base, model, at=[step])
        data.run(model, optimizer, step + 1, seed)
        report = optimizer.report
        assert report is not None
        rows.append(
            {
                "data": name,
                "network": title,
                "step": step,
                "seed": seed,
                "factor": report.objective_after / report.objective_before,
                "drift": report.drift,
                "reason": report.reason,
            }
        )
    return rows


def repeated(name: str, data: Data, seeds: int) -> list[dict[str, Any]]:
    """Adam with and without."""
    rows = []
    for activation, lr, every, seed in itertools.product((nn.ReLU, nn.Tanh), (1e-3, 1e-2), (0, 10), range(seeds)):
        model = data.network((48, 32), activation, seed)
        base = torch.optim.Adam(model.parameters(), lr=lr)
        optimizer = metatele.TeleportOptimizer(base, model, every=every) if every else base
        losses = data.run(model, optimizer, 600, seed)
        rows.append({"data": name, "activation": activation.__name__, "lr": lr, "every": every, "seed": seed, **losses})
    return rows


def transport(name: str, data: Data, seeds: int) -> list[dict[str, Any]]:
    """Kept and transported state."""
    rows = []
    for move, kin, every, seed in itertools.product(MOVES, KIN, (10, 40), range(seeds)):
        row: dict[str, Any] = {"data": name, "move": move, "optimizer": kin.__name__, "every": every, "seed": seed}
        for state in ("keep", "transport"):
            model = data.network((48, 32), nn.ReLU, seed)
            base = kin(model.parameters(), lr=3e-3)
            optimizer = metatele.TeleportOptimizer(base, model, MOVES[move](), every=every, state=state)
            row[state] = data.run(model, optimizer, 200, seed)
        rows.append(row)
    return rows


def ratio(pairs: Iterable[tuple[float | None, float | None]]) -> str:
    """Geometric mean of ``a / b`` with its 95 % interval, and the largest."""
    logs = [math.log(a / b) for a, b in pairs if a and b]
    mean, half = statistics.mean(logs), half_width(logs)
    low, middle, high = (math.exp(v) for v in (mean - half, mean, mean + half))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}), largest {math.exp(max(logs)):.3g}"


def table(result: dict[str, Any]) -> None:
    """Print what is stored."""
    for title in NETWORKS:
        factors = [row["factor"] for row in result["default"] if row["network"] == title]
        print(f"default, {title}: factor {min(factors):.2f} to {max(factors):.2f}")
    cells = itertools.product(SETS, ("ReLU", "Tanh"), (1e-3, 1e-2), ("train", "held_out"))
    for name, activation, lr, part in cells:
        rows = [r for r in result["repeated"] if (r["data"], r["activation"], r["lr"]) == (name, activation, lr)]
        pairs = zip(*([r[part] for r in rows if r["every"] == every] for every in (10, 0)), strict=True)
        print(f"repeated, {name}, {activation}, lr {lr}, {part}: with / without {ratio(pairs)}")
    for name, move, every, part in itertools.product(SETS, MOVES, (10, 40), ("train", "held_out")):
        rows = [r for r in result["transport"] if (r["data"], r["move"], r["every"]) == (name, move, every)]
        pairs = [(r["transport"][part], r["keep"][part]) for r in rows]
        print(f"transport, {name}, {move}, every {every}, {part}: transport / keep {ratio(pairs)}")


def main() -> None:
    """Measure, or read, and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=whole_number(2), default=3)
    p.add_argument("--json", type=Path)
    p.add_argument("--table", type=Path, help="print what this file holds, and measure nothing")
    args = p.parse_args()
    if args.table is not None:
        table(json.loads(args.table.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(seeds=args.seeds)}
    result |= {part: [] for part in ("default", "repeated", "transport")}
    for name in SETS:
        data = Data(name)
        for part, measure in (("default", default), ("repeated", repeated), ("transport", transport)):
            result[part] += measure(name, data, args.seeds)
            save(args.json, result)
    table(result)


if __name__ == "__main__":
    main()
