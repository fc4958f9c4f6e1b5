"""``python -m benchmarks.pages``: write the pages, or say with ``--check`` which are not what the results give."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.pages.model import ROOT
from benchmarks.pages.written import written


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what differs, and name it."""
    p = argparse.ArgumentParser("python -m benchmarks.pages", description=__doc__, allow_abbrev=False)
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not as it should be")
    args = p.parse_args(arguments)
    stale = []
    for name, text in written().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    said = "stale" if args.check else "written"
    print("\n".join(f"{said}: {name}" for name in stale) or "every page is what the results give")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
