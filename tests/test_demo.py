"""``metatele demo``: it trains, says what it found, and works in the bare install."""

import io
import json
import subprocess
import sys

import pytest
import torch

from metatele.cli import demo


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Runners of one epoch on the digits."""
    return demo.race(demo.images(0)[1], 1, 0, lambda runners: None)


def without(monkeypatch, *modules):
    monkeypatch.setattr(demo, "is_there", lambda name: name not in modules)


def test_it_writes_curves_and_names_its_figure(tmp_path, capsys):
    demo.main(["--epochs", "1", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"figure: {tmp_path / 'a' / 'loss.png'}")
    assert "| LearnedOptimizer |" in said
    assert "\x1b" not in said  # no terminal: plain lines
    assert (tmp_path / "a" / "loss.png").read_bytes()[1:4] == b"PNG"
    found = json.loads((tmp_path / "a" / "curves.json").read_text())
    assert [curve["steps"] for curve in found["curves"]] == [[0, 23]] * 3


def test_the_bare_install_gets_made_up_images_and_a_plot_in_letters(tmp_path, capsys, monkeypatch):
    without(monkeypatch, "sklearn", "matplotlib")
    demo.main(["--epochs", "1", "--out", str(tmp_path / "a"), "--threads", "1"])
    said = capsys.readouterr().out
    assert "made-up images" in said
    assert "held-out loss: * LearnedOptimizer" in said
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["curves.json"]


def test_all_start_from_one_network_and_end_lower(short):
    assert len({runner.held_out[0] for runner in short}) == 1
    assert all(runner.held_out[-1] < runner.held_out[0] for runner in short)


def test_a_seed_fixes_what_is_found(short):
    again = demo.race(demo.images(0)[1], 1, 0, lambda runners: None)
    assert [r.held_out for r in again] == [r.held_out for r in short]
    assert demo.network(1)[0].weight.ne(demo.network(0)[0].weight).any()


def test_made_up_images_are_those_of_their_seed(monkeypatch):
    without(monkeypatch, "sklearn")
    first, again, other = (demo.images(seed)[1][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_terminal_sees_lines_drawn_over_themselves_and_a_file_each_quarter(short):
    stream = Terminal()
    display = demo.Display([r.name for r in short], 23, stream)
    display.show(short)
    display.show(short)
    assert stream.getvalue().count("\x1b[3F") == 1
    assert stream.getvalue().count("█" * 24) == 6
    plain = io.StringIO()
    display = demo.Display([r.name for r in short], 23, plain)
    display.show(short)
    display.show(short)
    assert plain.getvalue().count("\n") == 1
    assert plain.getvalue().startswith("step 23 of 23, held-out loss: LearnedOptimizer 0.")


def test_it_opens_nothing_where_there_is_no_display(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not demo.opened(tmp_path / "loss.png")


def test_help_imports_no_torch():
    told = "import sys; from metatele.cli.demo import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
