"""Every command and every Python block of the README runs, in order, as a new user would run it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A block after this mark takes minutes; its commands are checked by `--help` only.
LONG = "<!-- takes minutes -->"


def blocks(language):
    """Code blocks with whether they are marked as long."""
    pattern = rf"({re.escape(LONG)}\n)?```{language}\n(.*?)```"
    return [(bool(long), code) for long, code in re.findall(pattern, README, re.DOTALL)]


def commands():
    for long, block in blocks("sh"):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if command and not command.startswith(("make", "git", "cd", "pip", "tensorboard")):
                yield long, command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, so that what the commands write stays out of it."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "*cache*", "quick")
    return Path(shutil.copytree(ROOT, folder / "metatele", ignore=ignore))


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_commands_run_in_order(checkout):
    found = list(commands())
    assert len(found) >= 5
    for long, command in found:
        if long:
            command = re.sub(r"^torchrun .*?(?=\S+\.py)", "python ", command)
            program = re.match(r"python (-m )?\S+( fig\d+)?", command)
            run(f"{program.group()} --help", checkout)
        else:
            run(command, checkout)
    assert (checkout / "runs" / "first" / "checkpoint" / "model.safetensors").is_file()
    assert (checkout / "results" / "quick" / "loss.png").is_file()


def test_python_blocks_run(checkout):
    found = [code for long, code in blocks("python") if not long]
    assert found
    for code in found:
        (checkout / "block.py").write_text(code, encoding="utf-8")
        run("python block.py", checkout)


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
