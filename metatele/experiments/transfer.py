"""One learned optimizer on networks and data mostly new to it, beside standard optimizers tuned on each.

Meta-trains ``--seeds`` optimizers (about 14 minutes each on one core) unless ``--runs`` holds them, and with
``--ablations`` shorter ones that lack something. Twelve kinds of full-batch regression, 64 held-out problems
each, and classification by mini-batches of 200, 5 networks each. Standard optimizers are tuned on other problems of the
same kind (for images, on other networks): the least mean loss at step 100, or training loss at the end. Time per step
is that of one torch model on this machine. A kind takes up to 8 minutes; a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele.command_line import OneLineParser, make_folder, whole_number
from metatele.errors import DataError
from metatele.experiments import images as common

if TYPE_CHECKING:
    from torch import Tensor

    from metatele.learned import EquivariantOptimizer
    from metatele.perceptron.activations import Activation
    from metatele.tasks import Fitting

OURS, FLAT, WHITENING = "metatele transfer", "LSTM(update,tele)", "Whitening + GD"
PATIENT = "Adam for step 1000"  # tuned for that
_FULL, _NETWORKS, _TUNING, _FEW = 64, 5, 32, 8
_STEPS, _LONG, _TARGET = 300, 1000, 100
_SHOWN = (10, 30, 100, 300, 1000)
_ABLATION_TRAJECTORIES, _ABLATION_SEEDS = 16 * 67, 2
# Problems on which meta-seeds are compared: of training's kinds, and long runs of mini-batches on wide networks.
_SELECTION = {"seed": 1000, "validation_trajectories": 4 * 30}
_SELECTION_HIDDEN, _SELECTION_STEPS = ((400, 200), (300, 300), (256, 128, 64)), 600
# Name to what is changed in the configuration of meta-training.
ABLATIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no teleport at the beginning": {"opening": False},
    "inputs' moments not used": {"inputs": False},
    "errors' moments not used": {"errors": False},
    "no teleport: learned update alone": {"opening": False, "inputs": False, "errors": False},
    "controller blind to slopes": {"blind": ("slopes",)},
    "controller blind to the loss": {"blind": ("loss",)},
    "controller blind to spectra": {"blind": ("spectra",)},
    "controller blind to sizes": {"blind": ("sizes", "cosine")},
    "controller blind to time, data and depth": {"blind": ("clock", "data", "place")},
}


def recorded(last: int) -> list[int]:
    """Steps whose losses are stored."""
    return [*range(min(30, last)), *range(30, min(300, last), 10), *range(300, last, 50), last]


# --- losses of one method


def summary(losses: Tensor) -> dict[str, Any]:
    """What is stored of losses ``[steps + 1, B]``: mean, median, 90 % quantile, and the largest rise."""
    import torch

    losses = losses.double().nan_to_num(nan=math.inf, posinf=math.inf)
    steps = recorded(len(losses) - 1)
    rows = losses[steps]

    def plain(values: Tensor) -> list[float | None]:
        return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.tolist()]

    rise = float((losses.max(0).values / losses[0]).max())
    return {
        "steps": steps,
        "mean": plain(rows.mean(1)),
        "median": plain(rows.median(1).values),
        "p90": plain(rows.quantile(0.9, 1, interpolation="lower")),
        "largest": plain(rows.max(1).values),
        "highest_over_first": float(f"{rise:.4g}") if math.isfinite(rise) else None,
        "diverged": int((~torch.isfinite(losses[-1])).sum()),
    }


def whitening_candidates() -> list[dict[str, float]]:
    """Settings among which whitening with gradient descent is tuned."""
    return [{"rate": 10 ** (e / 4), "damping": d} for e in range(-10, 3) for d in (1e-6, 1e-4, 1e-2, 1.0)]


def standard(problems: Fitting, tuning: Fitting) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Name, chosen settings and losses of every optimizer that is not learned."""
    import torch

    from metatele.learned import ConstantOptimizer
    from metatele.training.baselines import EVERYWHERE, run_candidates, tune
    from metatele.unroll import losses_of

    few = tuning.part(slice(_FEW))
    for baseline in EVERYWHERE:
        chosen = tune(baseline, tuning if baseline.batched else few, _TARGET)
        steps = _LONG if baseline.batched else _STEPS
        given = problems if baseline.batched else problems.part(slice(2 * _FEW))
        yield baseline.name, chosen, run_candidates(baseline, [chosen], given, steps)[:, 0]
        if baseline.name == "Adam":  # what it can do with more time
            chosen = tune(baseline, few, _LONG)
            yield PATIENT, chosen, run_candidates(baseline, [chosen], given, steps)[:, 0]
    grid = whitening_candidates()
    ends = [losses_of(ConstantOptimizer(**c), few, _TARGET)[-1].double().mean() for c in grid]
    chosen = grid[int(torch.stack(ends).nan_to_num(nan=math.inf).argmin())]
    yield WHITENING, chosen, losses_of(ConstantOptimizer(**chosen), problems, _LONG)


def standard_regression(name: str) -> list[dict[str, Any]]:
    """All methods but ours on one kind of regression."""
    from metatele.tasks.held_out import REGRESSIONS

    kind = REGRESSIONS[name]
    problems, tuning = kind.sample(1, "evaluation", _FULL), kind.sample(1, "tuning", _TUNING)
    methods = [
        {"name": method, "settings": settings, "trajectories": losses.shape[1], **summary(losses)}
        for method, settings, losses in standard(problems, tuning)
    ]
    if name == "paper":
        methods.append({"name": FLAT, "settings": {}, "trajectories": _FULL, **summary(_flat(problems))})
    return methods


def regression(name: str, optimizer: EquivariantOptimizer) -> dict[str, Any]:
    """A learned optimizer on one kind of regression."""
    from metatele.tasks.held_out import REGRESSIONS
    from metatele.unroll import losses_of

    problems = REGRESSIONS[name].sample(1, "evaluation", _FULL)
    return {"settings": {}, "trajectories": _FULL, **summary(losses_of(optimizer, problems, _LONG))}


def _flat(problems: Fitting) -> Tensor:
    """The paper's own method with this package's settings, on the one shape it fits."""
    from metatele import checkpoint
    from metatele.tasks import Problems
    from metatele.training.curves import learned_curves

    flat = checkpoint.load(Path(__file__).parents[2] / "checkpoints" / "update-tele").optimizer
    given = Problems(problems.mlp, problems.inputs, problems.targets, problems.initial)
    return learned_curves(flat, given, _LONG)[0]


# --- images


class Classifying:
    """Networks of one shape on one image set, evaluated on all of it after each epoch.

    Args:
        name: Among the held-out classifications.
        images: The set.
    """

    def __init__(self, name: str, images: Any) -> None:
        from metatele.perceptron.activations import ReLU
        from metatele.perceptron.mlp import MLP
        from metatele.tasks.held_out import CLASSIFICATIONS

        self.name, self.images, self.kind = name, images, CLASSIFICATIONS[name]
        self.mlp = MLP((images.features, *self.kind.hidden, images.classes), ReLU(), True)
        self.given, self.tuning = self._problems("evaluation", _NETWORKS, 1), self._problems("tuning", 2, 2)
        self.steps = self.kind.epochs * self.given.batches

    def _problems(self, stream: str, count: int, seed: int) -> Fitting:
        from metatele.perceptron.losses import CrossEntropy
        from metatele.random import generator
        from metatele.tasks import Fitting
        from metatele.tasks.fitting import usual_weights

        w, images = usual_weights(self.mlp, count, generator(1, stream)), self.images
        x, y = images.train_images.T, images.train_labels
        return Fitting(self.mlp, x, y, w, CrossEntropy(), self.kind.batch_size, seed)

    def scores(self, flat: Tensor) -> list[list[float]]:
        """Training loss, test loss and test accuracy of each network."""
        from metatele.perceptron.losses import CrossEntropy

        images = self.images
        parts = ((images.train_images, images.train_labels), (images.test_images, images.test_labels))
        found = []
        for row in flat:
            w, values = self.mlp.unflatten(row), []
            for x, y in parts:
                outputs = self.mlp.forward(w, x.T)
                values.append(float(CrossEntropy().value(outputs, y)))
            values.append(float((outputs.argmax(0) == y).double().mean()))
            found.append([v if math.isfinite(v) else math.inf for v in values])
        return found

    def watched(self) -> tuple[Callable[[int, Tensor], None], dict[int, list[list[float]]]]:
        """What is called after every step, and the scores by epoch that it fills in."""
        seen: dict[int, list[list[float]]] = {}

        def watch(step: int, flat: Tensor) -> None:
            if step % self.given.batches == 0:
                seen.setdefault(step // self.given.batches, []).extend(self.scores(flat))

        return watch, seen

    def rolled(self, optimizer: EquivariantOptimizer, fitting: Fitting) -> dict[int, list[list[float]]]:
        """Scores by epoch along trajectories."""
        import torch

        from metatele.learned.equivariant.rollout import Rollout

        watch, seen = self.watched()
        with torch.no_grad():
            at = Rollout.begin(fitting)
            for step in range(self.steps + 1):
                watch(step, at.weights)
                if step < self.steps:
                    at = at.advanced(optimizer)
        return seen

    def entry(
        self, method: str, settings: dict[str, Any], seen: dict[int, list[list[float]]], **more: Any
    ) -> dict[str, Any]:
        """What is stored."""
        rows = [seen[epoch] for epoch in sorted(seen)]
        keys = ("train_loss", "test_loss", "test_accuracy")
        columns = {key: [[_short(net[i]) for net in epoch] for epoch in rows] for i, key in enumerate(keys)}
        found = {"name": method, "settings": settings, **more, **columns}
        print(f"  {self.name}: {method} {settings or ''} {_mean(found['train_loss'][-1]):.4g}", flush=True)
        return found

    def standard(self) -> list[dict[str, Any]]:
        """All methods but ours."""
        from metatele.learned import ConstantOptimizer
        from metatele.training.baselines import EVERYWHERE, run_candidates

        methods, last = [], self.kind.epochs
        for baseline in EVERYWHERE:
            if baseline.name == "L-BFGS":  # its line search is for one and the same batch
                continue
            watch, seen = self.watched()
            coarse = baseline.grid[:: 2 if baseline.name != "Muon" else 1]
            run_candidates(baseline, coarse, self.tuning, self.steps, watch)
            ends = [sum(net[0] for net in seen[last][2 * c : 2 * c + 2]) for c in range(len(coarse))]
            chosen = coarse[ends.index(min(ends))]
            watch, seen = self.watched()
            run_candidates(baseline, [chosen], self.given, self.steps, watch)
            methods.append(self.entry(baseline.name, chosen, seen))
        candidates = [c for c in whitening_candidates() if c["damping"] >= 1e-2 and c["rate"] <= 0.2][::2]
        first = self.tuning.part(slice(1))
        ends = [sum(net[0] for net in self.rolled(ConstantOptimizer(**c), first)[last]) for c in candidates]
        chosen = candidates[ends.index(min(ends))]
        methods.append(self.entry(WHITENING, chosen, self.rolled(ConstantOptimizer(**chosen), self.given)))
        return methods


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float:
    return math.inf if None in values else sum(v for v in values if v is not None) / len(values)


# --- time


def milliseconds(task: dict[str, Any], learned: EquivariantOptimizer) -> dict[str, float]:
    """Of one training step of one torch model: forward, backward, step; the least of several turns."""
    import torch
    from torch import nn

    import metatele
    from metatele.learned import ConstantOptimizer
    from metatele.training.baselines import EVERYWHERE

    if task["kind"] == "regression":
        from metatele.tasks.held_out import REGRESSIONS

        kind = REGRESSIONS[task["name"]]
        given = kind.sample(1, "tuning", 1)
        x, y = given.inputs[0].T.contiguous(), given.targets[0].T.contiguous()
        modules = [_module(f) for f in kind.mlp.activations]
        bias = kind.mlp.biases[0]
        batches = [(x, y)]
    else:
        n, (d, *_, o) = task["batch_size"], task["widths"]
        draws = torch.Generator().manual_seed(0)
        # As compressible as images are.
        x = (torch.randn(10 * n, 40, generator=draws) @ torch.randn(40, d, generator=draws) - 3).relu()
        y = torch.randint(o, (10 * n,), generator=draws)
        modules, bias = [nn.ReLU() for _ in task["widths"][2:]], True
        batches = list(zip(x.split(n), y.split(n), strict=True))

    loss: nn.Module = nn.MSELoss() if task["kind"] == "regression" else nn.CrossEntropyLoss()

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(task["widths"], task["widths"][1:], strict=False)):
            layers += [nn.Linear(a, b, bias), *modules[i : i + 1]]
        return nn.Sequential(*layers)

    net = model()
    made: dict[str, tuple[nn.Module, Any]] = {}
    for baseline in EVERYWHERE:
        if task["kind"] == "classification" and baseline.name == "L-BFGS":
            continue
        settings = next(m["settings"] for m in task["methods"] if m["name"] == baseline.name)
        net = model()
        made[baseline.name] = net, baseline.optimizer(net.parameters(), **settings)
    made[PATIENT] = made["Adam"]
    for method, optimizer in ((WHITENING, ConstantOptimizer(0.1, 0.01)), (OURS, learned)):
        net = model()
        made[method] = net, metatele.LearnedOptimizer(net, optimizer)
    if any(m["name"] == FLAT for m in task["methods"]):
        net = model()
        folder = Path(__file__).parents[2] / "checkpoints" / "update-tele"
        made[FLAT] = net, metatele.LearnedOptimizer(net, folder)
    count = 20 if max(task["widths"]) > 400 else 40
    best = dict.fromkeys(made, math.inf)
    for turn in range(6):
        for method, (net, optimizer) in made.items():
            begin_s = time.perf_counter()
            for step in range(count):
                inputs, targets = batches[step % len(batches)]

                def closure(net: Any = net, optimizer: Any = optimizer, x: Any = inputs, y: Any = targets) -> Any:
                    optimizer.zero_grad()
                    value = loss(net(x), y)
                    value.backward()
                    return value

                optimizer.step(closure)
            if turn:  # the first one warms up
                best[method] = min(best[method], 1e3 * (time.perf_counter() - begin_s) / count)
    return {method: float(f"{value:.4g}") for method, value in best.items()}


def _module(activation: Activation) -> Any:
    from torch import nn

    slope = getattr(activation, "slope", None)
    return getattr(nn, type(activation).__name__)(*(() if slope is None else (slope,)))


# --- ablations


def ablation(optimizer: EquivariantOptimizer, tasks: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Loss at step 100 relative to tuned Adam's, for each kind of regression."""
    from metatele.tasks.held_out import REGRESSIONS
    from metatele.unroll import losses_of

    ratios: dict[str, float | None] = {}
    for task in tasks:
        if task["kind"] == "regression":
            problems = REGRESSIONS[task["name"]].sample(1, "evaluation", _FULL)
            ratio = float(losses_of(optimizer, problems, _TARGET)[-1].double().mean()) / _score(
                task, _of(task, "Adam")[0]
            )
            ratios[task["name"]] = float(f"{ratio:.4g}") if math.isfinite(ratio) else None
    return ratios


def ablations(tasks: Sequence[dict[str, Any]], runs: Path) -> list[dict[str, Any]]:
    """Meta-training without one thing or another, in a few seeds."""
    from metatele import checkpoint
    from metatele.config import transfer
    from metatele.training.run import train_once

    found = []
    for name, changes in ABLATIONS.items():
        ratios = []
        for seed in range(_ABLATION_SEEDS):
            folder = runs / f"ablation-{name.replace(' ', '-').replace(':', '')}-{seed}"
            train_once(transfer(trajectories=_ABLATION_TRAJECTORIES, seed=seed, **changes), folder)
            key = [
                checkpoint.read_config(folder)["model_sha256"],
                [[t["name"], _score(t, _of(t, "Adam")[0])] for t in tasks],
            ]
            ratios.append(_kept(folder / "ratios.json", key, partial(ablation, _loaded(folder), tasks)))
        found.append({"name": name, "ratios": ratios})
    return found


# --- the one for the repository


def _on_large_data(optimizer: EquivariantOptimizer) -> float:
    """Mean log of the loss relative to the initial one, half way and at the end of runs on data like images."""
    import torch

    from metatele.perceptron.activations import ReLU
    from metatele.perceptron.losses import CrossEntropy
    from metatele.perceptron.mlp import MLP
    from metatele.random import generator
    from metatele.tasks import Fitting
    from metatele.tasks.fitting import image_like, usual_weights
    from metatele.unroll import losses_of

    d, classes, logs = 600, 10, []
    for number, hidden in enumerate(_SELECTION_HIDDEN):
        draws, mlp = generator(_SELECTION["seed"], "validation", number), MLP((d, *hidden, classes), ReLU(), True)
        X, labels = image_like(draws, (d, 40, classes, 30_000))
        problem = Fitting(mlp, X, labels, usual_weights(mlp, 1, draws), CrossEntropy(), 200, number)
        losses = losses_of(optimizer, problem, _SELECTION_STEPS).double()
        for step in (_SELECTION_STEPS // 2, _SELECTION_STEPS):
            ratio = losses[step - 19 : step + 1].mean() / losses[0].mean()
            logs.append(float(torch.nan_to_num(ratio, nan=1e6).clamp(1e-12, 1e6).log()))
    return sum(logs) / len(logs)


def selection_scores(folders: Sequence[Path]) -> list[float]:
    """Of each run's checkpoint on the same problems, none of them held out: the least is the best.

    The sum of the validation score on training's kinds of problems, and of its like on larger data and networks.
    """
    from metatele import checkpoint
    from metatele.config import transfer
    from metatele.tasks import Mixture
    from metatele.training.groups import validation_score

    config = transfer(**_SELECTION)

    def measure(folder: Path) -> tuple[float, float]:
        optimizer = _loaded(folder)
        return validation_score(optimizer, Mixture(config.task), config)[0], _on_large_data(optimizer)

    scores = []
    for folder in folders:
        key = [checkpoint.read_config(folder)["model_sha256"], _SELECTION, _SELECTION_HIDDEN, _SELECTION_STEPS]
        scores.append(sum(_kept(folder / "selection.json", key, partial(measure, folder))))
    return scores


def publish(doc: dict[str, Any], folders: Sequence[Path], out: Path) -> None:
    """The checkpoint of the meta-seed with the best selection score, on which no held-out problem had a say."""
    from metatele import checkpoint
    from metatele.config import transfer

    scores = doc["selection_scores"]
    seed = scores.index(min(scores))
    found = checkpoint.load(folders[seed])
    checkpoint.save(
        out / "transfer",
        found.optimizer,
        run=transfer(seed=seed),
        progress={**found.training, "seconds": doc["training_seconds"][seed]},
        scores={**found.scores, "selection_score": scores[seed]},
    )
    print(f"published meta-seed {seed} in {out / 'transfer'}")


# --- everything


def _kept(file: Path, key: list[Any], make: Callable[[], Any]) -> Any:
    """What an interrupted run had measured under the same circumstances, or what is measured now."""
    from metatele.files import write_atomically

    key = json.loads(json.dumps(key))
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return stored["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = make()
    write_atomically(file, json.dumps({"key": key, "found": found}).encode())
    return found


def _task(
    name: str, images: Any, learned: Sequence[EquivariantOptimizer], digests: list[str], runs: Path
) -> dict[str, Any]:
    """All methods on one kind of problem; ``images`` is ``None`` for a regression."""
    from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS
    from metatele.training.baselines import EVERYWHERE

    tuned = [[b.name, b.grid] for b in EVERYWHERE]
    classifying = None if images is None else Classifying(name, images)

    def others() -> list[dict[str, Any]]:
        print(f"{name}: standard optimizers", flush=True)
        return standard_regression(name) if classifying is None else classifying.standard()

    def ours(seed: int) -> dict[str, Any]:
        print(f"{name}: meta-seed {seed}", flush=True)
        if classifying is None:
            return regression(name, learned[seed])
        return classifying.entry(OURS, {}, classifying.rolled(learned[seed], classifying.given))

    task: dict[str, Any] = {"name": name}
    if classifying is None:
        kind = REGRESSIONS[name]
        task |= {"title": kind.title, "kind": "regression", "widths": list(kind.mlp.widths)}
        task |= {"samples": kind.samples, "suffices": kind.suffices}
    else:
        task |= {"title": CLASSIFICATIONS[name].title, "kind": "classification", "widths": list(classifying.mlp.widths)}
        task |= {"batch_size": classifying.kind.batch_size, "batches": classifying.given.batches}
    task["methods"] = list(_kept(runs / f"standard-{name}.json", tuned, others))
    for seed, digest in enumerate(digests):
        found = _kept(runs / f"learned-{name}-{seed}.json", [digest], partial(ours, seed))
        task["methods"].append({**found, "name": OURS, "meta_seed": seed})
    file, key = runs / f"milliseconds-{name}.json", [tuned, digests[0]]
    task["milliseconds"] = _kept(file, key, partial(milliseconds, task, learned[0]))
    return task


def _loaded(folder: Path) -> EquivariantOptimizer:
    from metatele import checkpoint
    from metatele.learned import EquivariantOptimizer

    optimizer = checkpoint.load(folder).optimizer
    assert isinstance(optimizer, EquivariantOptimizer)
    return optimizer


def _folders(args: Any) -> list[Path]:
    return [Path(args.runs) / f"seed-{seed}" for seed in range(args.seeds)]


def run(args: Any, out: Path) -> dict[str, Any]:
    """The content of ``results.json``."""
    import torch

    from metatele import checkpoint
    from metatele.config import transfer
    from metatele.data import load_images
    from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS
    from metatele.training.run import train_once

    begin_s, runs = time.perf_counter(), Path(args.runs)
    names = args.tasks or [*REGRESSIONS, *CLASSIFICATIONS]
    sets: dict[str, Any] = {}
    for name in list(names):
        if name in CLASSIFICATIONS and (dataset := CLASSIFICATIONS[name].dataset) not in sets:
            try:
                sets[dataset] = load_images(dataset, args.data_root)
            except DataError as error:
                if args.tasks:
                    raise
                print(f"left out: {error}", flush=True)
                names = [n for n in names if n not in CLASSIFICATIONS or CLASSIFICATIONS[n].dataset != dataset]
    folders = _folders(args)
    for seed, folder in enumerate(folders):
        train_once(transfer(seed=seed), folder)
    learned = [_loaded(folder) for folder in folders]
    make_folder(out)
    digests = [checkpoint.read_config(folder)["model_sha256"] for folder in folders]
    tasks = []
    for name in names:
        images = sets[CLASSIFICATIONS[name].dataset] if name in CLASSIFICATIONS else None
        tasks.append(_task(name, images, learned, digests, runs))
    doc = {
        "format": common.FORMAT,
        "experiment": "transfer",
        "tasks": tasks,
        "meta_seeds": args.seeds,
        "training_seconds": [json.loads((f / "seconds.json").read_text()) for f in folders],
        "selection_scores": selection_scores(folders),
        "parameters": sum(p.numel() for p in learned[0].parameters()),
        "ablations": [],
        "versions": {
            **checkpoint.versions(),
            "machine": platform.machine(),
            "threads": str(torch.get_num_threads()),
        },
    }
    if args.ablations:
        doc["ablations"] = ablations(tasks, runs)
    doc["seconds"] = time.perf_counter() - begin_s
    return doc


# --- table and figures


def at_step(method: dict[str, Any], step: int, key: str = "mean") -> float:
    """A stored loss; infinite where it diverged, not a number where it was not run so far."""
    if step not in method["steps"]:
        return math.nan
    value = method[key][method["steps"].index(step)]
    return math.inf if value is None else value


def reached(method: dict[str, Any], target: float) -> int | None:
    """First stored step at which the mean loss is no larger."""
    pairs = zip(method["steps"], method["mean"], strict=True)
    return next((step for step, value in pairs if value is not None and value <= target), None)


def _of(task: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [m for m in task["methods"] if m["name"] == name]


def methods_of(doc: dict[str, Any]) -> list[str]:
    """All names, in the order of the table."""
    names = dict.fromkeys(m["name"] for task in doc["tasks"] for m in task["methods"])
    return [*(n for n in names if n != OURS), OURS]


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return "diverged" if math.isinf(value) else f"{value:.2g}"


def _spread(values: Sequence[float]) -> str:
    """Mean over meta-training seeds, and the range."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return _number(sum(values) / len(values))
    return f"{_number(sum(values) / len(values))} ({_number(min(values))} to {_number(max(values))})"


def _score(task: dict[str, Any], method: dict[str, Any]) -> float:
    """What is compared: mean loss at step 100, or training loss at the end."""
    return at_step(method, _TARGET) if task["kind"] == "regression" else _mean(method["train_loss"][-1])


def _after(task: dict[str, Any], steps: float) -> float:
    """The better of both Adams' losses at the last stored step up to one; not a number beyond the last."""
    found = [m for name in ("Adam", PATIENT) for m in _of(task, name)]
    known = [s for s in found[0]["steps"] if s <= steps]
    return math.nan if steps > found[0]["steps"][-1] else min(at_step(m, known[-1]) for m in found)


def table(doc: dict[str, Any]) -> list[list[str]]:
    """A row for each task: losses of all methods at equal steps, and where ours stands against tuned Adam."""
    names = methods_of(doc)
    head = ["task", *names, "Adam / ours", "steps to Adam's", "Adam / ours at equal time", "ms a step, of Adam's"]
    rows = [head]
    for task in doc["tasks"]:
        adam, ours = _of(task, "Adam")[0], _of(task, OURS)
        target = _score(task, adam)
        cells = [f"{task['title']}, {'-'.join(map(str, task['widths']))}"]
        if task["kind"] == "regression":
            cells[0] += f", {task['samples']} samples"
        for name in names:
            found = [_score(task, m) for m in _of(task, name)]
            cells.append(_spread(found) if found else "")
        mean = sum(_score(task, m) for m in ours) / len(ours)
        pace = task["milliseconds"][OURS] / task["milliseconds"]["Adam"]
        cells.append(f"{target / mean:.2g}")
        if task["kind"] == "regression":
            steps = [reached(m, target) for m in ours]
            known = [s for s in steps if s is not None]
            complete = len(known) == len(steps)
            cells.append(f"{sum(known) / len(known):.0f} of {_TARGET}" if complete else "not reached")
            cells.append(_number(_after(task, pace * _TARGET) / mean))
        else:
            cells += ["", ""]
        cells.append(f"{pace:.1f}")
        rows.append(cells)
    return rows


def details(doc: dict[str, Any]) -> str:
    """The other tables, in Markdown: over time, at other steps, test losses, ablations."""
    from metatele.training.report import markdown

    parts = []
    for task in doc["tasks"]:
        parts.append(f"\n{task['title']}, {'-'.join(map(str, task['widths']))}\n\n")
        if task["kind"] == "regression":
            target = _score(task, _of(task, "Adam")[0])
            rows = [
                [
                    "method",
                    *(f"step {s}" for s in _SHOWN),
                    "steps to Adam's loss",
                    "ms a step",
                    "ms to Adam's loss",
                    "highest / first",
                ]
            ]
            for name in methods_of(doc):
                if found := _of(task, name):
                    ms, steps = task["milliseconds"][name], [reached(m, target) for m in found]
                    known = [s for s in steps if s is not None]
                    mean = sum(known) / len(known) if len(known) == len(steps) else None
                    rise = max(m["highest_over_first"] or math.inf for m in found)
                    rows.append(
                        [
                            name,
                            *(_spread([at_step(m, s) for m in found]) for s in _SHOWN),
                            "" if mean is None else f"{mean:.0f}",
                            f"{ms:.2f}",
                            "" if mean is None else f"{mean * ms:.3g}",
                            f"{rise:.3g}",
                        ]
                    )
        else:
            rows = [["method", "training loss", "test loss", "test accuracy", "ms a step", "seconds"]]
            for name in methods_of(doc):
                if found := _of(task, name):
                    ms, steps = task["milliseconds"][name], (len(found[0]["train_loss"]) - 1) * task["batches"]
                    ends = ([_mean(m[key][-1]) for m in found] for key in ("train_loss", "test_loss", "test_accuracy"))
                    rows.append([name, *(_ends(e) for e in ends), f"{ms:.2f}", f"{ms * steps / 1e3:.1f}"])
        parts.append(markdown(rows))
    if doc["ablations"]:
        parts.append(
            "\nMeta-trained for less time, without something; mean loss at step 100 over tuned Adam's, geometric means "
            "over seeds, and over all kinds with the range of seeds\n\n"
        )
        kinds = [t for t in doc["tasks"] if t["kind"] == "regression"]
        rows = [["", *(t["name"] for t in kinds), "all"]]
        plain = {t["name"]: _score(t, _of(t, WHITENING)[0]) / _score(t, _of(t, "Adam")[0]) for t in kinds}
        alone = {"name": "whitening + GD, tuned on each, nothing learned", "ratios": [plain]}
        for found in [*doc["ablations"], alone]:
            values = [[math.inf if r[t["name"]] is None else r[t["name"]] for t in kinds] for r in found["ratios"]]
            overall = [_geometric(row) for row in values]
            text = _number(_geometric(overall))
            if len(overall) > 1:
                text += f" ({_number(min(overall))} to {_number(max(overall))})"
            rows.append([found["name"], *(_number(_geometric(column)) for column in zip(*values, strict=True)), text])
        parts.append(markdown(rows))
    return "".join(parts)


def _geometric(values: Sequence[float]) -> float:
    return math.inf if math.inf in values else math.exp(sum(math.log(max(v, 1e-30)) for v in values) / len(values))


def _ends(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    text = f"{sum(values) / len(values):.4f}"
    return text if len(values) < 2 else f"{text} ({min(values):.4f} to {max(values):.4f})"


_COLOURS = {
    "SGD": "#999999",
    "Momentum": "#56B4E9",
    "Adam": "#009E73",
    PATIENT: "#006B4E",
    "AdamW": "#66CC99",
    "Muon": "#CC79A7",
    "L-BFGS": "#A6761D",
    WHITENING: "#0072B2",
    FLAT: "#E69F00",
    OURS: "#D55E00",
}


def figure(doc: dict[str, Any], time_axis: bool = False) -> bytes:
    """A panel for each task: loss against the step, or against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = doc["tasks"]
    columns = min(5, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    fig, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.75 * rows + 0.5), squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        for name in methods_of(doc):
            found = _of(task, name)
            if not found:
                continue
            scale = task["milliseconds"][name] / 1e3 if time_axis else 1
            if task["kind"] == "regression":
                xs = [max(s, 0.7) * scale for s in found[0]["steps"]]
                curves = [[math.nan if v is None else v for v in m["mean"]] for m in found]
            else:
                xs = [1.0 * e * task["batches"] * scale for e in range(len(found[0]["train_loss"]))]
                curves = [[_mean(epoch) for epoch in m["train_loss"]] for m in found]
            mean = [math.exp(sum(math.log(max(v, 1e-30)) for v in at) / len(at)) for at in zip(*curves, strict=True)]
            style = {"color": _COLOURS[name], "linewidth": 2.4 if name == OURS else 1.3}
            if len(curves) > 1:
                low, high = ([f(at) for at in zip(*curves, strict=True)] for f in (min, max))
                axes.fill_between(xs, low, high, color=_COLOURS[name], alpha=0.2, linewidth=0)
            axes.plot(xs, mean, label=name, zorder=3 if name == OURS else 2, **style)
        axes.set_yscale("log")
        if task["kind"] == "regression":
            axes.set_xscale("log")
        size = "-".join(map(str, task["widths"]))
        more = f", {task['samples']} samples" if task["kind"] == "regression" else ""
        axes.set_title(f"{task['title']}\n{size}{more}" if size not in task["title"] else task["title"], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(True, alpha=0.3)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("seconds" if time_axis else "step", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss", fontsize=8)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(9, len(handles)), fontsize=8)
    fig.suptitle("mean over held-out problems; every other method tuned on each task, ours on none", fontsize=10)
    fig.set_layout_engine("constrained")
    return common.png(fig)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    from metatele.files import write_atomically

    p = OneLineParser(prog="metatele.experiments transfer", description=__doc__, allow_abbrev=False)
    p.add_argument("--seeds", type=whole_number(1), default=5, metavar="N", help="meta-training seeds (default 5)")
    p.add_argument(
        "--runs", metavar="FOLDER", default="runs/transfer", help="run folders, used again (default runs/transfer)"
    )
    p.add_argument("--tasks", nargs="+", metavar="NAME", help="which (default all)")
    p.add_argument("--ablations", action="store_true", help="also meta-train without one thing or another")
    p.add_argument("--publish", metavar="FOLDER", help="copy the best run by validation score there")
    p.add_argument("--data-root", metavar="FOLDER", help="folder with MNIST's files (default: METATELE_DATA)")
    p.add_argument("--out", metavar="FOLDER", default="results/transfer", help="(default results/transfer)")
    p.add_argument("--redraw", action="store_true", help="tables and figures again from the stored results.json")
    args = p.parse_args(arguments)
    out = Path(args.out)
    _check_tasks(args.tasks)
    doc = common.stored(out, "transfer", rows="tasks") if args.redraw else run(args, out)
    write_atomically(out / "details.md", details(doc).encode())
    write_atomically(out / "time.png", figure(doc, time_axis=True))
    common.finish(doc, out, table, figure)
    if args.publish and not args.redraw:
        publish(doc, _folders(args), Path(args.publish))


def _check_tasks(names: Sequence[str] | None) -> None:
    from metatele.errors import ConfigError
    from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS

    known = [*REGRESSIONS, *CLASSIFICATIONS]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"tasks must be among {', '.join(known)}, got {name!r}")
