"""What steppers say to their user, each with the page that helps."""

from __future__ import annotations

from metatele.errors import with_page

WORKS = "docs/learned-optimizer.md#what-works-with-it"
WARNINGS = "docs/learned-optimizer.md#what-its-warnings-mean"

MANY_LOST = 10  # gradients in a row that are not finite, before it is said

REPLACED = with_page("a parameter of the model was replaced after the optimizer was made; make it anew", WORKS)
SPARSE = with_page("LearnedOptimizer does not support sparse gradients", WORKS)
NOT_FINITE = with_page(f"the last {MANY_LOST} gradients were not finite, and no step was made by them", WARNINGS)
STANDS = with_page(
    "the weights hardly move any more: gradients are zero or not finite, or their loss is at its minimum", WARNINGS
)
