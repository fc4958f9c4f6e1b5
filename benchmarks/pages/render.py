"""Markdown of a claim's page."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.pages.model import Claim, Outcome, Table, stored, verdict

NOTICE = "<!-- Made by `python -m benchmarks.pages` from results/. Do not edit. -->"
BRACKETS = (
    "Answers in brackets do not count for the verdict: they go beyond the claim or its data, rest on a single run, "
    "or say "
    "that nothing happens."
)
_SIGN = {True: "yes", False: "no"}


def page(claim: Claim) -> str:
    """The whole page."""
    outcome = claim.read()
    path, caption = claim.figure
    parts = [
        f"# {claim.title}",
        NOTICE,
        f"**The paper says** ({claim.place}): {claim.says}",
        f"**Verdict: {verdict(outcome.checks)}.** {_count(outcome)} {outcome.answer}",
        f"![{caption}](../../results/{path})",
        caption + ".",
        "## What was checked",
        claim.setting,
        checks(outcome),
        *([BRACKETS] if not all(c.counted for c in outcome.checks) else []),
    ]
    if outcome.tables:
        parts += ["## Numbers", *(table.shown() for table in outcome.tables)]
    parts += [part() for part in claim.extra]
    if outcome.limits:
        parts += ["## Where it loses", "\n".join(f"- {line}" for line in outcome.limits)]
    parts += ["## Run it again", f"<!-- takes minutes -->\n```sh\n{claim.rebuild.strip()}\n```", ran(claim)]
    if claim.more:
        parts.append(claim.more)
    parts.append("[All claims](index.md), [how a verdict is made](index.md#how-a-verdict-is-made).")
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(part: str) -> str:
    """A paragraph or a list, in lines as long as those of the other pages; anything else as it is."""
    if part.startswith(("|", "#", "<", "```", "![")) or "\n|" in part or "```" in part:
        return part
    fill = textwrap.TextWrapper(130, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in part.split("\n") if part.startswith("- ") else [" ".join(part.split("\n"))]:
        fill.subsequent_indent = "  " if line.startswith("- ") else ""
        lines.append(fill.fill(line))
    return "\n".join(lines)


def _count(outcome: Outcome) -> str:
    counted = [check.met for check in outcome.checks if check.counted]
    return f"Of {len(counted)} checks, {sum(counted) or 'none'} {'are' if sum(counted) > 1 else 'is'} met."


def checks(outcome: Outcome) -> str:
    """What the verdict is made of, as a table."""
    rows = [
        [c.statement, c.measured, c.needed, _SIGN[c.met] if c.counted else f"({_SIGN[c.met]})"] for c in outcome.checks
    ]
    return Table("", ["what should be", "measured", "met if", "met"], rows, numbers=False).shown()


def ran(claim: Claim) -> str:
    """Where the raw results came from, as they say themselves."""
    rows = []
    for source in claim.sources:
        doc = stored(source)
        about = doc if isinstance(doc, dict) else {}
        link = f"[{source}](../../results/{source})"
        rows.append([link, machine(about), _seeds(about), seconds(about)])
    return Table("", ["raw result", "machine and versions", "runs", "running time"], rows, numbers=False).shown()


def machine(doc: dict[str, Any]) -> str:
    """Versions, processor and threads, as far as they are stored."""
    found = {**doc.get("versions", {}), **doc.get("environment", {})}
    if not found:
        return "CPU; versions not stored"
    words = [f"{name} {found[name]}" for name in ("metatele", "torch", "python") if name in found]
    words.append(
        f"{found['machine']}, {found['threads']} threads"
        if str(found["threads"]) != "1"
        else f"{found['machine']}, 1 thread"
    )
    return ", ".join(words)


def _seeds(doc: dict[str, Any]) -> str:
    if doc.get("experiment") == "table1":
        return f"{len(doc['arms'])} networks"
    if "networks" in doc:
        count = doc["networks"]
        return f"{count if isinstance(count, int) else len(count)} networks"
    seeds = doc.get("seeds")
    if seeds is None:
        return f"{doc['runs']} runs" if "runs" in doc else ""
    count = seeds if isinstance(seeds, int) else len(seeds)
    return f"{count} seeds" if count > 1 else "1 seed"


def seconds(doc: dict[str, Any]) -> str:
    """Running time in words: the sum of what is stored."""
    found = doc.get("seconds", doc.get("environment", {}).get("seconds"))
    if isinstance(found, dict):
        whole = [v for name, v in found.items() if name.startswith("in all")]
        known = [v for v in found.values() if isinstance(v, (int, float))]
        found = (
            max(sum(known) - sum(whole), *whole) if whole else sum(known) if "plain_sharpness" not in found else None
        )
    if found is None:
        return "not stored"
    training = [s for m in doc.get("methods", ()) for s in m.get("training_seconds", ())]
    if training:
        return f"{duration(sum(training))} of meta-training"
    return duration(found)


def duration(value: float) -> str:
    """Seconds, minutes or hours.

    Example:
        >>> duration(59), duration(600), duration(7300)
        ('59 s', '10 min', '2.0 h')
    """
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
