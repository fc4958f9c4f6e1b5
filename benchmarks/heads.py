"""How far a run depends on the basis of attention heads: the learned optimizer beside AdamW.

python benchmarks/heads.py --data-root DATA --json results/benchmarks/heads.json
python benchmarks/heads.py --table results/benchmarks/heads.json   # print it again

A small character GPT (2 layers of 64, 4 heads, context 64, batches of 32) starts as it was drawn, or with a random
change of basis of every head: ``W_q → M W_q``, ``W_k → M^{-T} W_k``, ``W_v → N W_v``, ``Wₒ → Wₒ N⁻¹``, with singular
values of M and N from ``condition^-½`` to ``condition^½``. Both compute the same. The training loss after 100 steps, on
128 fixed windows, tells what the change costs. ``ours`` balances heads where they need it, ``ours, always`` from any
start on, ``ours, never`` not at all. AdamW has the best of three rates, chosen on another seed; ``AdamW, balanced``
starts with ``balance_heads_``. About five minutes on one core.

Flags: --seeds, --steps, --json, --table, --data-root (folder with tinyshakespeare/input.txt).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_tasks import TASKS, Attention, Split  # noqa: E402
from common import environment, save  # noqa: E402

import metatele  # noqa: E402

TUNED_ON, RATES = 1000, (1e-3, 3e-3, 1e-2)
HEADS = {"ours": None, "ours, always": 1.0, "ours, never": 0.0}
RUNS = (  # method, condition of the change; 1 is the start as it was drawn
    *(("ours", condition) for condition in (1, 4, 10, 100, 1000)),
    ("ours, always", 1),
    ("ours, never", 4),
    ("ours, never", 100),
    ("AdamW", 1),
    ("AdamW", 100),
    ("AdamW, balanced", 1),
    ("AdamW, balanced", 100),
)


def change(k: int, condition: float, random: torch.Generator) -> Tensor:
    Q, P = (torch.linalg.qr(torch.randn(k, k, generator=random, dtype=torch.float64))[0] for _ in range(2))
    return Q * torch.logspace(-0.5, 0.5, k, base=condition, dtype=torch.float64) @ P


@torch.no_grad()
def changed_(model: nn.Module, condition: float, seed: int) -> None:
    """Put every head into a random basis, in double precision."""
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, Attention):
            continue
        W, b, out = (p.double() for p in (layer.qkv.weight, layer.qkv.bias, layer.out.weight))
        width = len(out)
        k = width // layer.heads
        for first in range(0, width, k):
            q, key, v = (slice(n * width + first, n * width + first + k) for n in range(3))
            M, N = (change(k, condition, random) for _ in range(2))
            for rows, by in ((q, M), (key, torch.linalg.inv(M).mT), (v, N)):
                W[rows], b[rows] = by @ W[rows], by @ b[rows]
            out[:, q] = out[:, q] @ torch.linalg.inv(N)
        layer.qkv.weight.copy_(W)
        layer.qkv.bias.copy_(b)
        layer.out.weight.copy_(out)


def made(method: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if method.startswith("AdamW"):
        return torch.optim.AdamW(model.parameters(), lr=lr)
    meta = metatele.load(ROOT / "checkpoints" / "general").optimizer
    if HEADS[method] is not None:
        meta.config = dataclasses.replace(meta.config, heads=HEADS[method])
    return metatele.LearnedOptimizer(model, meta)


def trained(method: str, condition: float, seed: int, steps: int, split: Split, lr: float = 0.0) -> dict[str, Any]:
    """One run."""
    task = TASKS["gpt"]
    torch.manual_seed(seed)
    model, random = task.model(), torch.Generator().manual_seed(100 + seed)
    if condition != 1:
        changed_(model, condition, seed)
    if method == "AdamW, balanced":
        metatele.balance_heads_(model, split.draw(torch.Generator().manual_seed(seed))[0])
    optimizer, losses, begun = made(method, model, lr), [], time.perf_counter()
    for _ in range(steps):
        x, y = split.draw(random)
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        end = task.loss(model(split.subset[0]), split.subset[1]).item()
    balanced = getattr(getattr(optimizer, "stepper", None), "heads", 0)
    row = {"method": method, "condition": condition, "seed": seed, "lr": lr, "loss": end, "balanced": balanced}
    return {**row, "losses": losses, "ms_per_step": 1000 * seconds / steps}


def text(root: Path) -> Split:
    codes = np.frombuffer((root / "tinyshakespeare" / "input.txt").read_bytes(), dtype=np.uint8)
    return TASKS["gpt"].split({"text": np.searchsorted(np.unique(codes), codes).astype(np.uint8)})


def table(result: dict[str, Any]) -> str:
    """Mean loss of each arm, and how far its runs are from the same method's of the start as it was drawn."""
    rows = {(r["method"], r["condition"], r["seed"]): r for r in result["rows"]}
    seeds = sorted({r["seed"] for r in result["rows"]})
    lines = ["| method | condition | balanced | loss | difference, mean | largest |", "|---|---|---|---|---|---|"]
    for method, condition in RUNS:
        base = method.split(",")[0]
        mine = [rows[method, condition, seed] for seed in seeds]
        far = [r["loss"] - rows[base, 1, r["seed"]]["loss"] for r in mine]
        balanced = "/".join(str(r["balanced"]) for r in mine)
        cells = [method, str(condition), balanced, f"{statistics.fmean(r['loss'] for r in mine):.4f}"]
        cells += [f"{statistics.fmean(far):+.4f}", f"{max(map(abs, far)):.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--data-root", type=Path, default=ROOT / "data")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    split = text(given.data_root)
    tuning = [trained("AdamW", 1, TUNED_ON, given.steps, split, lr) for lr in RATES]
    lr = min(tuning, key=lambda row: row["loss"])["lr"]
    rows = []
    for seed in range(given.seeds):
        for method, condition in RUNS:
            rows.append(trained(method, condition, seed, given.steps, split, lr if method.startswith("AdamW") else 0.0))
            row = rows[-1]
            print(f"{method}, condition {condition}, seed {seed}: {row['loss']:.4f}", file=sys.stderr, flush=True)
    result = {"rows": rows, "tuning": tuning, "steps": given.steps, "environment": environment()}
    save(given.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
