"""Figure 6: meta-train every method, evaluate on held-out trajectories, draw.

``--preset paper`` (the paper's settings): about 4 minutes on 2 cores with one seed, of which a half
minute is evaluation. The paper's figure shows LSTM(update,tele) lowest over 30 steps; its reference
code, when measured, has it above LSTM(update) from step 1 on and diverging by step 99.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatele.command_line import OneLineParser, device_named, make_folder, whole_number
from metatele.config import METHODS, PRESETS, preset, to_dict
from metatele.errors import RunFolderError

_SELECTION = 128


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    p = OneLineParser(prog="metatele.experiments fig6", description=__doc__, allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="paper", help="settings of the meta-training (default paper)")
    p.add_argument("--out", metavar="FOLDER", help="results (default RUNS/results)")
    p.add_argument("--runs", metavar="FOLDER", help="run folders, used again when finished (default runs/fig6-PRESET)")
    p.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="meta-training seeds (default 1)")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which (default all)")
    p.add_argument("--trajectories", type=whole_number(1), default=64, metavar="N", help="held-out (default 64)")
    p.add_argument("--steps", type=whole_number(1), default=300, metavar="N", help="of each (default 300)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--publish", metavar="FOLDER", help="copy each method's best run by validation score there")
    p.add_argument("--redraw", action="store_true", help="table and figure again from the stored curves.json")
    args = p.parse_args(arguments)
    runs = Path(args.runs or f"runs/fig6-{args.preset}")
    out = Path(args.out or runs / "results")

    from metatele.training.report import FORMAT, write

    if args.redraw:
        try:
            doc = json.loads((out / "curves.json").read_text(encoding="utf-8"))
            doc = doc if doc["format"] == FORMAT else {}
            doc["methods"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"there is no readable curves.json in {out}") from error
    else:
        device_named(args.device)
        make_folder(out)
        doc = run(args.preset, args.methods, runs, args.seeds, args.trajectories, args.steps, args.device)
    try:
        print(write(doc, out), end="")
    except (KeyError, IndexError, TypeError) as error:
        if not args.redraw:
            raise
        raise RunFolderError(f"curves.json in {out} is not complete: {error!r} is missing") from error
    print(f"figure: {out / 'loss.png'}")
    if args.publish and not args.redraw:
        publish(args.methods, runs, args.seeds, doc, Path(args.publish))


def run(
    preset_name: str,
    methods: Sequence[str],
    runs: Path,
    seeds: int,
    trajectories: int,
    steps: int,
    device_name: str,
) -> dict[str, Any]:
    """Train what is not trained yet, evaluate everything, and return the content of ``curves.json``."""
    import torch

    from metatele import checkpoint
    from metatele.tasks import Regression
    from metatele.training.baselines import baseline_curves
    from metatele.training.curves import Curves, learned_curves, worst_rise
    from metatele.training.report import document
    from metatele.training.run import train_once

    device = device_named(device_name)
    begin_s = time.perf_counter()
    for seed in range(seeds):
        for method in methods:
            train_once(preset(preset_name, method, seed=seed), runs / f"{method}-{seed}", device)
    task = preset(preset_name).task
    problems = Regression(task).sample(1, "evaluation", range(trajectories)).to(device)
    entries = []
    for method in methods:
        folders = [runs / f"{method}-{seed}" for seed in range(seeds)]
        results = [learned_curves(checkpoint.load(f, device).optimizer, problems, steps) for f in folders]
        losses = [result[0].double() for result in results]
        pooled = Curves(
            METHODS[method],
            torch.cat(losses, 1),
            results[0][1],
            f"preset {preset_name}, seeds 0 to {seeds - 1}",
            to_dict(preset(preset_name, method).method),
        ).to_json()
        pooled["seed_means"] = [[v if math.isfinite(v) else None for v in loss.mean(1).tolist()] for loss in losses]
        rise = max(worst_rise(loss.mean(1).nan_to_num(nan=torch.inf)) for loss in losses)
        pooled["worst_rise"] = rise if math.isfinite(rise) else None
        pooled["training_seconds"] = [json.loads((f / "seconds.json").read_text()) for f in folders]
        entries.append(pooled)
    baselines = baseline_curves(Regression(task), problems, steps, seed=1)
    doc = document(baselines, task, 1, str(device))
    doc["methods"] = entries + doc["methods"]
    doc["preset"], doc["seeds"] = preset_name, seeds
    doc["seconds"] = time.perf_counter() - begin_s
    return doc


def publish(methods: Sequence[str], runs: Path, seeds: int, doc: dict[str, Any], out: Path) -> None:
    """Checkpoints for the repository: of each method the seed with the best validation score.

    The choice is made on ``_SELECTION`` trajectories of the validation stream, more than a run looks
    at, so that rare divergences count. ``scores`` gains the held-out losses of this evaluation, which
    had no part in the choice.
    """
    from metatele import checkpoint
    from metatele.tasks import Regression
    from metatele.training.curves import held_out_score, learned_curves

    for entry, method in zip(doc["methods"], methods, strict=False):
        loaded = [checkpoint.load(runs / f"{method}-{seed}") for seed in range(seeds)]
        training = preset(doc["preset"], method).training
        problems = Regression(preset(doc["preset"], method).task).sample(0, "validation", range(_SELECTION))
        curves = [learned_curves(c.optimizer, problems, training.validation_steps)[0] for c in loaded]
        scores = [held_out_score(c.double().mean(1), training.validation_score_at) for c in curves]
        seed = scores.index(min(scores))
        means = entry["seed_means"][seed]
        shown = [s for s in (1, 10, 20, 29, 99, 299) if s < len(means)]
        held_out = {"trajectories": doc["trajectories"], "loss_at": {str(s): means[s] for s in shown}}
        checkpoint.save(
            out / method,
            loaded[seed].optimizer,
            progress={**loaded[seed].training, "seconds": entry["training_seconds"][seed]},
            scores={**loaded[seed].scores, "selection_score": scores[seed], "held_out": held_out},
        )
        print(f"published {method}, seed {seed}, in {out / method}")
