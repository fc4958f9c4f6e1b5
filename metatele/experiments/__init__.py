"""One file for each figure or table: ``python -m metatele.experiments NAME``."""
