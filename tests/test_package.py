"""What a release is made of: its files say the same, and what is built passes the index's checks."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import metatele

ROOT = Path(__file__).resolve().parent.parent


def test_version_is_the_same_everywhere():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(metatele.__version__)}$", text, re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == metatele.__version__


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_forms_are_read(form):
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert said["blank_issues_enabled"] is True
        return
    assert said["name"]
    assert said["description"]
    asked = [part for part in said["body"] if part["type"] != "markdown"]
    assert asked
    assert len({part["id"] for part in asked}) == len(asked)


@pytest.mark.skipif(importlib.util.find_spec("twine") is None, reason="twine is not installed")
def test_wheel_and_sdist_pass_twine(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    files = [str(file) for file in tmp_path.iterdir()]
    assert sorted(Path(file).suffix for file in files) == [".gz", ".whl"]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
