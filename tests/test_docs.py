"""Every command and Python block of the README and of each page runs as for a new user, and leaves no trace."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A block after this mark takes minutes; its commands are checked against `--help` only.
LONG = "<!-- takes minutes -->"
# A block after this one runs where these modules are installed.
NEEDS = r"<!-- needs ([\w, ]+) -->"
# A block that begins with this comment is that file; a command on its page runs it.
_FILE = re.compile(r"# (\S+\.py)\n")
_MADE = ("_build", "reference", "tutorials")  # folders of docs/ that are written when it is built
_WRITTEN = [p for p in (ROOT / "docs").rglob("*.md") if p.relative_to(ROOT / "docs").parts[0] not in _MADE]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "README.md", *_WRITTEN))
LINKED = sorted({*PAGES, *(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")))})
# What prepares the machine, or waits for a person.
_NOT_RUN = ("make", "git", "cd", "pip", "tensorboard")
_PROGRAM = r"python (?:-m metatele (?:train|evaluate|experiments \S+)|-m \S+|\S+\.py)"


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """Code blocks of a page: whether marked as long, line of their beginning, code."""
    marks = rf"({re.escape(LONG)}\n)?(?:{NEEDS}\n)?"
    found = re.finditer(rf"{marks}```{language}\n(.*?)```", text(page), re.DOTALL)
    there = [m for m in found if m[2] is None or all(map(importlib.util.find_spec, m[2].split(", ")))]
    return [(bool(m[1]), text(page)[: m.start(3)].count("\n"), m[3]) for m in there]


def commands(page):
    """Commands of a page, in order; the console command by this interpreter, whether it is installed or not."""
    for long, _, block in blocks(page, "sh"):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command and not command.startswith(_NOT_RUN):
                yield long, re.sub(r"^metatele ", "python -m metatele ", command)


def help_of(command):
    """The command that asks for help in place of a long one, and the flags that must be in the answer."""
    command = re.sub(r"^torchrun .*?(?=\S+\.py)", "python ", command)
    program = re.match(_PROGRAM, command)
    assert program, f"no program is known in {command!r}"
    return f"{program[0]} --help", re.findall(r"(?<=\s)--[a-z-]+", command[program.end() :])


def headings(page):
    """Anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone of the tree as it is now, in which git sees what the commands leave behind."""
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "build", "_build", "*cache*", "*.egg-info", ".hypothesis")
    folder = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "metatele", ignore=ignore))
    if shutil.which("git"):
        run("git init -q . && git add -A", folder)
        run("git -c user.name=test -c user.email=test@localhost commit -q -m tree", folder)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_and_leaves_the_tree_clean(page, checkout, tmp_path):
    answers = {}
    for long, command in commands(page):
        if not long:
            run(command, checkout)
            continue
        question, flags = help_of(command)
        if question not in answers:
            answers[question] = run(question, checkout)
        missing = [flag for flag in flags if not re.search(rf"{flag}\b(?!-)", answers[question])]
        assert not missing, f"{command}: {', '.join(missing)} not in the help"
    # One process for all blocks, since torch takes long to import; each has names and a file of its own.
    files = []
    for long, line, code in blocks(page, "python"):
        if named := _FILE.match(code):
            assert code == text(named[1])
        elif not long:
            files.append(tmp_path / f"{Path(page).stem}_line_{line}.py")
            files[-1].write_text("\n" * line + code, encoding="utf-8")
    if files:
        each = "import runpy, sys; [runpy.run_path(file, run_name='__main__') for file in sys.argv[1:]]"
        run(f'python -c "{each}" {" ".join(map(str, files))}', checkout)
    if shutil.which("git"):
        left = run("git status --porcelain", checkout)
        run("git clean -fdxq && git checkout -q .", checkout)  # for the next page
        assert left == ""


@pytest.mark.parametrize("page", LINKED)
def test_links_images_and_anchors_of_a_page_exist(page):
    without_code = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.resolve().exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            assert anchor in headings(os.path.relpath(found.resolve(), ROOT)), f"{page}: no heading for {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for page in PAGES:
        for _, _, tree in blocks(page, r"\{toctree\}"):
            lines = [line.split("<")[-1].strip("> ") for line in tree.splitlines() if line and line[0] not in ": "]
            listed |= {os.path.normpath(Path(page).parent / f"{line}.md") for line in lines}
    assert set(PAGES) - {"README.md", "docs/index.md"} <= listed


def test_readme_is_short():
    assert len(text("README.md").splitlines()) <= 150
    assert len(text("README.md").split()) <= 1200


def test_no_sentence_of_the_readme_has_more_than_thirty_words():
    prose = re.sub(r"```.*?```", "", text("README.md"), flags=re.DOTALL)
    prose = re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    for paragraph in re.split(r"\n\s*\n|\n- ", prose):
        for sentence in re.split(r"(?<=[.!?:])\s+", paragraph):
            assert len(sentence.split()) <= 30, sentence


def test_every_public_name_has_its_place_in_the_reference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from_code = importlib.import_module("from_code")
    from_code.write(tmp_path)
    for file in (ROOT / "metatele").rglob("__init__.py"):
        room = ".".join(file.parent.relative_to(ROOT).parts)
        if room not in from_code.ROOMS:
            told = room.startswith(("metatele.experiments", "metatele.network")) or not hasattr(
                importlib.import_module(room), "__all__"
            )
            assert told, f"{room} has public names and no page"
            continue
        page = (tmp_path / f"{room}.md").read_text(encoding="utf-8")
        for name in from_code.public(room):
            assert re.search(rf"(:: |\.|`metatele\.){re.escape(name)}\b", page), f"{room}.{name}"
