"""Results to and from ``results.json``. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from metatele.errors import RunFolderError
from metatele.experiments.transfer.results import (
    Ablation,
    ClassificationTask,
    Losses,
    RegressionTask,
    Results,
    Scores,
)

_TASKS: dict[str, tuple[type[Any], type[Any]]] = {
    "regression": (RegressionTask, Losses),
    "classification": (ClassificationTask, Scores),
}


def method_json(method: Losses | Scores) -> dict[str, Any]:
    """A method's results as they are stored."""
    found = dataclasses.asdict(method)
    if method.meta_seed is None:
        del found["meta_seed"]
    return found


def to_json(results: Results) -> dict[str, Any]:
    """The results as they are stored, but for the head of the document."""
    tasks = [
        {**dataclasses.asdict(task), "kind": task.kind, "methods": [method_json(m) for m in task.methods]}
        for task in results.tasks
    ]
    return {**dataclasses.asdict(results), "tasks": tasks}


def from_json(document: dict[str, Any]) -> Results:
    """The inverse of :func:`to_json`; what else a document holds is its head.

    Raises:
        RunFolderError: Something is missing, or is not known.
    """
    try:
        tasks = []
        for stored in document["tasks"]:
            values = dict(stored)
            task, method = _TASKS[values.pop("kind")]
            tasks.append(task(**{**values, "methods": [method(**m) for m in values["methods"]]}))
        values = {f.name: document[f.name] for f in dataclasses.fields(Results)}
        return Results(**{**values, "tasks": tasks, "ablations": [Ablation(**a) for a in document["ablations"]]})
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"results.json does not hold results of this version's experiment: {error}") from error
