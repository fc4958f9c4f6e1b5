"""The house seen from outside: floors, sizes of files, sources, docstrings of what is public."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "metatele"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 450  # lines, without a reason
PUBLIC = (
    "metatele",
    "metatele.perceptron",
    "metatele.symmetry",
    "metatele.geometry",
    "metatele.teleport",
    "metatele.learned",
    "metatele.tasks",
    "metatele.data",
)
# Public names without an example of their own, and why.
WITHOUT_EXAMPLE = {
    "EquivariantStates": "what a step hands to the next one; made and read by EquivariantOptimizer",
    "LSTMState": "what a step hands to the next one; made and read by StackedLSTM",
    "MoveStates": "what a step hands to the next one; made and read by MetaOptimizer",
    "Observation": "what EquivariantOptimizer is given; made by an unroll or by an optimizer",
    "Opened": "what Opening returns",
    "Report": "what a move returns; the example of every move shows one",
    "Stepped": "what MetaOptimizer.step returns",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def floors():
    """Rooms of CONTRIBUTING's table with their floors: ``x/`` is a package, ``x`` a module, ``x.py`` a script."""
    found = {}
    for number, rooms in re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M):
        for room in re.findall(r"`([^`]+)`", rooms):
            assert room not in found, f"{room} stands on two floors"
            found[room] = int(number)
    return found


FLOORS = floors()


def room_of(module):
    """The room of a module; the nearest of those that hold it. The package's own file is ``__init__``."""
    inner = module.split(".")[1:]
    if not inner:
        return "__init__"
    for length in range(len(inner), 0, -1):
        name = "/".join(inner[:length])
        for room in (f"{name}/", name):
            if room in FLOORS:
                return room
    raise AssertionError(f"{module} belongs to no room of CONTRIBUTING's table")


def imported_by(path):
    """Modules of the package that a file imports, wherever the import stands, with its line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "metatele")


def test_every_room_of_the_table_exists():
    assert FLOORS
    for room in FLOORS:
        path = ROOT / room if room.endswith(".py") else PACKAGE / (room if room.endswith("/") else f"{room}.py")
        assert path.exists(), f"{room} of CONTRIBUTING's table is not there"


def test_rooms_import_from_lower_floors_alone():
    wrong = []
    for module, path in MODULES.items():
        own = room_of(module)
        for name, line in imported_by(path):
            other = room_of(name)
            if other != own and FLOORS[other] >= FLOORS[own]:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{line}: {own} ({FLOORS[own]}) imports {other} ({FLOORS[other]})"
                )
    assert not wrong, "\n".join(wrong)


def test_a_long_file_says_why():
    for path in SOURCES:
        text = path.read_text("utf-8")
        if text.count("\n") > LONGEST:
            reason = ast.get_docstring(ast.parse(text)) or ""
            assert "Long because" in reason, f"{path.relative_to(ROOT)} has more than {LONGEST} lines and says not why"


@pytest.mark.parametrize("folder", ["metatele", "tests", "benchmarks"])
def test_sources_are_the_papers_own_numbers(folder):
    foreign = re.compile("PAPER" + r"(\.md| ?§)")  # in two parts, so that this line is none
    bare = re.compile(r"(?<!2024, )(?<![\w.])Eq\. \d")
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        if foreign.search(text):
            wrong.append(f"{path.relative_to(ROOT)} names a file that is not in the repository")
        flowing = " ".join(text.replace("#", " ").split())
        found = bare.search(flowing)
        if found and folder == "metatele":
            around = flowing[max(0, found.start() - 60) : found.end()]
            wrong.append(f"{path.relative_to(ROOT)} has an equation without its source: {around}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_public_shows_itself_by_an_example(module):
    room = importlib.import_module(module)
    silent = [
        name
        for name in room.__all__
        if name not in WITHOUT_EXAMPLE
        and (inspect.isclass(thing := getattr(room, name)) or inspect.isfunction(thing))
        and ">>>" not in (thing.__doc__ or "")
    ]
    assert not silent, f"no example in the docstring of {', '.join(silent)}"


# Attributes that begin with an underscore and are read in tests all the same, and why.
NOT_PRIVATE = {
    "_replace": "public: how a NamedTuple gives a changed copy",
    "_forward_hooks": "torch's: whether hooks of ours are left on a module",
}
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def called(node):
    """Last name of what is called: ``setattr`` for ``monkeypatch.setattr(...)``."""
    return getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None


def private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in NOT_PRIVATE


def names_of_the_package(tree):
    """Names that imports of a test bind to the package, its modules, and what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (getattr(node, "module", None) or alias.name).split(".")[0] == "metatele":
                    yield (alias.asname or alias.name).split(".")[0]


def intrusions(tree):
    """Lines of a test that read a private member, or patch a private member or constant of the package."""
    ours = set(names_of_the_package(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, f"reads {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "metatele":
            yield from ((node.lineno, f"imports {alias.name}") for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and target.attr.isupper() and root_of(target) in ours:
                    yield node.lineno, f"patches {ast.unparse(target)}"
        elif called(node) in ("setattr", "delattr", "getattr", "patch", "object") and node.args:
            place = node.args[0]  # an object, or a dotted path as text
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            of_ours = root_of(place) in ours or any(text.startswith("metatele.") for text in texts)
            for name in (text.rpartition(".")[2] for text in texts):
                if private(name) or (of_ours and name.isupper() and called(node) != "getattr"):
                    yield node.lineno, f"patches {ast.unparse(node)}"


def root_of(node):
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_tests_neither_patch_constants_nor_read_private_members():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in TESTS
        for line, what in intrusions(ast.parse(path.read_text("utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "optimizer._steps",
        "from metatele.files import _written",
        "import metatele.files as files\nmonkeypatch.setattr(files, 'LIMIT', 3)",
        "from metatele import files\nfiles.LIMIT = 3",
        "monkeypatch.setattr('metatele.files.LIMIT', 3)",
        "monkeypatch.setattr(thing, '_limit', 3)",
        "getattr(optimizer, '_steps')",
    ],
)
def test_intrusions_are_found(code):
    assert list(intrusions(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["layer._forward_hooks", "self.__dict__", "monkeypatch.setattr(torch.linalg, 'eigh', unsteady)"]
)
def test_what_is_no_intrusion_is_let_pass(code):
    assert not list(intrusions(ast.parse(code)))


def test_exceptions_are_still_public():
    public = {name for module in PUBLIC for name in importlib.import_module(module).__all__}
    assert set(WITHOUT_EXAMPLE) <= public
