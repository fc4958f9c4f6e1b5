"""What an error or a warning says to read is there."""

import ast
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import metatele
from metatele import errors
from metatele.extras import missing_message
from metatele.network.ranks import refuse_sharded

ROOT = Path(__file__).parent.parent
PAGE = re.compile(r"(?:docs/[\w/-]+|README|CONTRIBUTING)\.md(?:#[\w-]+)?")


@functools.cache
def named():
    """Every page that is named in a string of the package, with where it is; docstrings name none for users."""
    found = set()
    for file in sorted((ROOT / "metatele").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = (
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        for text in inner:
            found |= {(page, str(file.relative_to(ROOT))) for page in PAGE.findall(text)}
    return sorted(found)


def anchors(page):
    """Anchors of a page's headings, made as GitHub and MyST make them."""
    lines = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "where"), named())
def test_a_page_that_a_message_names_is_there(page, where):
    path, _, anchor = page.partition("#")
    assert (ROOT / path).is_file(), where
    assert not anchor or anchor in anchors(path), f"{where}: no heading for {page}"


def test_the_errors_users_meet_most_name_a_page():
    assert sum(where != "metatele/errors.py" for _, where in named()) >= 14


@pytest.mark.parametrize("kind", errors.MetateleError.__subclasses__())
def test_an_error_ends_with_its_page_and_survives_a_pickle(kind):
    error = kind("no such thing", page="README.md#install")
    assert str(error) == "no such thing (see README.md#install)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind("alone")) == "alone"


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def stepped(change):
    net = model()
    optimizer = metatele.LearnedOptimizer(net)
    net(torch.ones(5, 3)).sum().backward()
    change(net)
    optimizer.step()


def sparse(net):
    net[0].weight.grad = net[0].weight.grad.to_sparse()


def replace(net):
    net[0].weight = nn.Parameter(torch.ones(4, 3))
    net(torch.ones(5, 3)).sum().backward()


class DTensor(nn.Parameter):
    pass


def full_graph(_):
    net = model()
    optimizer = metatele.LearnedOptimizer(net)
    torch.compile(net, fullgraph=True, backend="eager")(torch.ones(5, 3))
    optimizer.step()


CASES = {
    "sparse": (RuntimeError, lambda: stepped(sparse), "docs/learned-optimizer.md#what-works-with-it"),
    "replaced": (errors.MetateleError, lambda: stepped(replace), "docs/learned-optimizer.md#what-works-with-it"),
    "group": (
        errors.ConfigError,
        lambda: metatele.LearnedOptimizer(net := model(), params=[{"params": net.parameters(), "betas": 1}]),
        "docs/learned-optimizer.md#use-it",
    ),
    "sharded": (
        errors.UnsupportedModelError,
        lambda: refuse_sharded([DTensor(torch.ones(2))], "LearnedOptimizer"),
        "docs/learned-optimizer.md#what-works-with-it",
    ),
    "checkpoint": (
        errors.CheckpointError,
        lambda: metatele.load("no-such-folder"),
        "docs/meta-training.md#load-what-you-trained",
    ),
    "fullgraph": (RuntimeError, lambda: full_graph(None), "docs/learned-optimizer.md#what-works-with-it"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_says_where_to_read(case):
    kind, act, page = CASES[case]
    with pytest.raises(kind) as caught:
        act()
    assert f"(see {page})" in str(caught.value)


def test_a_missing_package_says_how_it_is_installed():
    assert missing_message("the figure", "matplotlib").endswith("pip install 'metatele[train]' (see README.md#install)")
