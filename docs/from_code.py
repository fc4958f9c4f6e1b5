"""Pages of the reference, written from the code when the documentation is built."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

# Rooms of the package, as a reader looks for them, and what each is for.
ROOMS = {
    "metatele": "What most programs need.",
    "metatele.symmetry": "The paper's actions on a pair of layers, and the groups that act.",
    "metatele.teleport": "Moves along level sets, and what they report.",
    "metatele.geometry": "Sharpness, curvature and gradient norms, of many networks at once and of any module.",
    "metatele.perceptron": "Batched perceptrons: shapes, activations, losses, passes by hand.",
    "metatele.learned": "Meta-optimizers, and the registry of their families.",
    "metatele.learned.general": "The optimizer of any module.",
    "metatele.unroll": "Unrolled trajectories, differentiable in the meta-parameters.",
    "metatele.tasks": "Small problems to meta-train on.",
    "metatele.tasks.modules": "The same on small modules.",
    "metatele.data": "Readers of image sets.",
    "metatele.config": "Settings of families, presets and runs.",
    "metatele.errors": "Every error that is raised on purpose.",
}


def public(room: str) -> list[str]:
    """Names of a room that users may rely on."""
    module = importlib.import_module(room)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == room and not n.startswith("_")]
    return sorted(n for n in names if not n.startswith("__"))


def write(folder: Path) -> None:
    """Write a page for each room, one for the settings, and the index; unchanged files are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{room}.md": _room(room, what) for room, what in ROOMS.items()}
    pages["settings.md"] = _settings()
    rows = "\n".join(f"| [`{room}`]({room}.md) | {what} |" for room, what in ROOMS.items())
    listed = "\n".join([*ROOMS, "settings"])
    pages["index.md"] = (
        "# Reference\n\nEvery public name, from its docstring. Names that start with an underscore may change.\n\n"
        f"| room | what |\n|:--|:--|\n{rows}\n| [Settings](settings.md) | every field of every configuration |\n\n"
        f"```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )
    for name, text in pages.items():
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _room(room: str, what: str) -> str:
    names = public(room)
    top = set() if room == "metatele" else set(public("metatele"))
    module = importlib.import_module(room)
    mine = [n for n in names if n not in top]
    shared = [n for n in names if n in top]
    lines = [f"# {room}", "", what, ""]
    if shared:
        links = ", ".join(f"{{py:obj}}`metatele.{n}`" for n in shared)
        lines += [f"Also here: {links}.", ""]
    lines += ["```{eval-rst}", f".. py:module:: {room}", "", f".. py:currentmodule:: {room}", ""]
    for name in mine:
        value = getattr(module, name)
        if isinstance(value, type):
            lines += [f".. autoclass:: {room}.{name}", "   :members:", ""]
        elif callable(value):
            lines += [f".. autofunction:: {room}.{name}", ""]
        else:
            lines += [f".. py:data:: {name}", "", f"   {_told(value)}", ""]
    return "\n".join([*lines, "```", ""])


def _told(value: object) -> str:
    if isinstance(value, dict):
        return f"By name: {', '.join(f'``{key}``' for key in value)}."
    if isinstance(value, tuple | list | frozenset) and all(isinstance(v, str) for v in value):
        return f"{', '.join(f'``{one}``' for one in value)}."
    return f"``{value}``".replace("\n", " ")


def _settings() -> str:
    config = importlib.import_module("metatele.config")
    lines = [
        "# Settings",
        "",
        "Every field is a flag of `metatele train`, with dashes for underscores. An unknown one is refused.",
        "",
    ]
    for name in public("metatele.config"):
        cls = getattr(config, name)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            continue
        rows = [
            f"| `{f.name}` | {_default(f)} | {f.metadata.get('help', '').replace('|', '/')} |"
            for f in dataclasses.fields(cls)
            if f.metadata.get("help")
        ]
        if rows:
            first = (cls.__doc__ or "").strip().splitlines()[0]
            lines += [f"## {name}", "", first, "", "| field | default | what |", "|:--|:--|:--|", *rows, ""]
    return "\n".join(lines)


def _default(f: dataclasses.Field[object]) -> str:
    if f.default is dataclasses.MISSING:
        return ""
    return f"`{f.default!r}`" if f.default != "" else "none"
