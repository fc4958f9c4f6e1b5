"""What each operation of a pass does to units; one file for each kind of operation."""

from metatele.network.rules import lookups, norms, pointwise, products, sums, views

__all__ = ["lookups", "norms", "pointwise", "products", "sums", "views"]
