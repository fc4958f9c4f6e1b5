"""The tutorials: their notebooks are those of the scripts, and run from top to bottom."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]_*.py"))
# Each notebook has names of its own, and all share one process, since torch takes long to import.
_RUN = """
import json, sys
for path in sys.argv[1:]:
    cells = json.load(open(path, encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path}, cell {number}", "exec"), names)
    assert "plt" in names and names["plt"].get_fignums(), f"{path} draws nothing"
    names["plt"].close("all")
"""


def cells(script):
    return json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def test_there_are_five():
    assert [path.name[0] for path in SCRIPTS] == list("12345")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_stored_notebook_is_that_of_its_script(script):
    pytest.importorskip("sphinx_gallery")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    stored = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert stored == notebooks.text(script), "run make notebooks"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_has_a_title_no_outputs_and_links_that_exist(script):
    stored = cells(script)
    assert stored[0]["cell_type"] == "markdown"
    assert stored[0]["source"][0].startswith("# ")
    for cell in stored:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
        else:
            assert ":doc:" not in text
            assert ".. " not in text
            for target in re.findall(r"\]\(([^)]+)\)", text):
                assert (EXAMPLES / target).exists(), f"{script.stem} links to {target}, which does not exist"


def test_notebooks_run_from_top_to_bottom_and_leave_nothing(tmp_path):
    before = sorted(EXAMPLES.rglob("*"))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    notebooks = [str(path.with_suffix(".ipynb")) for path in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *notebooks],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []
    assert sorted(EXAMPLES.rglob("*")) == before
