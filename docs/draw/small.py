"""A figure as a small PNG: few colours, as drawings have."""

from __future__ import annotations

import io
from typing import Any


def small_png(figure: Any, dpi: int = 110, colours: int = 192) -> bytes:
    """Bytes of a PNG with a palette."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    buffer.seek(0)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(colours).save(small, format="PNG", optimize=True)
    return small.getvalue()
