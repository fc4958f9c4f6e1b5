"""A recording says what the optimizer did, and changes nothing of it."""

import copy
import io
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from general_cases import optimizer_of
from torch import nn
from torch.nn import functional

import metatele
from metatele.errors import ConfigError
from metatele.optim.recording import figure_of


def net(depth=1):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def batches(steps):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 5, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(steps)]


def train(model, optimizer, steps, each=None):
    for x, y in batches(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if each is not None:
            each()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimize", [optimizer_of, lambda m: metatele.LearnedOptimizer(m, total_steps=40)])
def test_training_is_the_same_to_the_bit_and_no_hook_is_left(optimize):
    one, other = net(), net()
    recorded = optimize(other)
    plain, recording = train(one, optimize(one), 40), recorded.record()
    torch.testing.assert_close(train(other, recorded, 40), plain, rtol=0, atol=0)
    assert len(recording) == 40
    assert not recorded.meta.controller._forward_hooks


def test_rows_hold_what_the_course_holds():
    model = net()
    optimizer = optimizer_of(model)
    recording, course = optimizer.record(), lambda: optimizer.stepper.course
    seen = []

    def look():
        c, (row, *_) = course(), reversed(recording.rows())
        assert (row["step"], row["log_length"]) == (c.age - 1, c.log_rate)
        assert row["length"] == math.exp(c.log_rate)
        if row["kind"] != "look":
            assert set(row) == {"step", "kind", "log_length", "loss", "length"}
            return
        seen.append(row["step"])
        for number, name in enumerate(("0.weight", "2.weight")):
            rows, layer = c.layout.rows(number), row["layers"][name]
            for key, value in (
                ("damping", c.controls.damping),
                ("exponent", c.anneal),
                ("stretch", c.controls.stretch),
                ("decay", c.controls.decay),
                ("spectral", c.controls.spectral),
                ("agreement", c.agreement),
                ("moved", c.layout.part(c.change, number).norm()[None] / c.sizes[rows]),
            ):
                expected = value if key == "moved" else value[rows]
                assert layer[key] == pytest.approx(expected.item(), rel=1e-6), key
        assert row["controls"]["longest"] == pytest.approx(c.pace[0])
        assert row["seen"]["agreement"] == pytest.approx(float(c.agreement_all))

    train(model, optimizer, 32, look)
    assert seen == [*range(11), 20, 30]
    json.dumps(recording.rows())


def test_a_loss_is_that_of_the_closure_or_what_looks_tell():
    x, y = batches(1)[0]
    model = net()
    optimizer = optimizer_of(model)
    recording = optimizer.record()
    first = float(functional.cross_entropy(model(x), y).detach())
    train(model, optimizer, 1)
    assert recording.rows()[0]["loss"] == pytest.approx(first, rel=1e-5)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    value = float(optimizer.step(closure).detach())
    assert recording.rows()[1]["loss"] == value


def test_frozen_layers_do_not_move_and_skipped_steps_say_so():
    model = net(3)
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model)
    recording = optimizer.record()
    train(model, optimizer, 3)
    layers = recording.rows()[-1]["layers"]
    assert layers["2.weight"]["moved"] == 0
    assert layers["0.weight"]["moved"] > 0
    model[0].weight.grad.fill_(float("nan"))
    optimizer.step()
    assert recording.rows()[-1]["kind"] == "skipped"
    assert recording.rows()[-1]["length"] is None


def test_one_batch_that_comes_again_is_told():
    torch.manual_seed(0)
    model, x, y = net(), torch.randn(12, 5), torch.randn(12, 3)
    model.append(nn.Linear(3, 4))
    y = torch.randn(12, 4)
    optimizer = optimizer_of(model)
    recording = optimizer.record()
    for _ in range(6):
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    kinds = [row["kind"] for row in recording.rows()]
    assert kinds[0] == "look"
    assert kinds[-1] == "one batch"
    assert recording.rows()[-1]["length"] is None
    recording.figure()


def test_a_recording_stops_and_thins():
    model = net()
    optimizer = optimizer_of(model)
    with optimizer.record(every=5) as recording:
        with pytest.raises(ConfigError, match="recorded already"):
            optimizer.record()
        train(model, optimizer, 25)
    assert not recording.active
    train(model, optimizer, 5)
    assert [row["step"] for row in recording.rows()] == [*range(11), 15, 20]
    rows = recording.rows()
    rows[0]["layers"]["0.weight"]["damping"] = -1.0
    assert recording.rows()[0]["layers"]["0.weight"]["damping"] > 0
    assert optimizer.record().active  # another one


def test_copies_and_pickles_are_not_recorded():
    model = net()
    optimizer = optimizer_of(model)
    recording = optimizer.record(writer=Writer())
    train(model, optimizer, 3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train(other.model, other, 2)
        assert other.record().active
    assert len(recording) == 3
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    train(model, optimizer, 1)
    assert len(recording) == 4


class Writer(list):
    def add_scalar(self, tag, value, step):
        self.append((tag, value, step))


def test_scalars_are_written_as_they_come_or_later():
    model, live, later = net(), Writer(), Writer()
    optimizer = optimizer_of(model)
    recording = optimizer.record(live)
    train(model, optimizer, 12)
    recording.write(later)
    assert live == later
    layer = recording.rows()[3]["layers"]["2.weight"]
    assert ("learned/damping/2.weight", layer["damping"], 3) in live
    assert sum(tag == "learned/length" for tag, _, _ in live) == 12


def test_a_figure_has_at_most_six_lines_a_panel(tmp_path):
    model = net(2)
    optimizer = optimizer_of(model)
    recording = optimizer.record()
    train(model, optimizer, 4)
    figure = recording.figure(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[1:4] == b"PNG"
    # Controls of fresh settings are the same in every layer.
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1, 1]
    for layers, lines in ((3, 3), (6, 6), (7, 1)):
        rows = json.loads(json.dumps(recording.rows()))
        for row in rows:
            numbers = row["layers"]["0.weight"]
            row["layers"] = {str(n): {name: value / (n + 1) for name, value in numbers.items()} for n in range(layers)}
        figure = figure_of(rows)
        assert [len(axes.get_lines()) for axes in figure.axes] == [2, lines, lines, lines]
        assert len(figure.legends[0].get_texts()) == (layers if layers <= 6 else 2)


def test_what_cannot_be_recorded_is_one_sentence():
    model = net()
    optimizer = optimizer_of(model)
    for arguments, message in (((None, 0), "every"), (("here",), "writer")):
        with pytest.raises(ConfigError, match=message):
            optimizer.record(*arguments)
    with pytest.raises(ConfigError, match="nothing was recorded"):
        optimizer.record().figure()
    flat = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LeakyReLU(0.1), nn.Linear(5, 3, bias=False))
    with pytest.raises(ConfigError, match="of the general family"):
        metatele.LearnedOptimizer(flat, "transfer").record()


def test_recording_needs_no_matplotlib_until_a_figure_is_drawn():
    code = "import sys, metatele; metatele.LearnedOptimizer; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_figure_draws_no_line_back_to_where_a_loaded_state_began():
    pytest.importorskip("matplotlib")
    layers = {"0.weight": {"damping": 5.0, "exponent": 0.2, "spectral": 0.9, "moved": 0.01}}
    steps = [0, 1, 2, 3, 1, 2]
    figure = figure_of([{"step": n, "kind": "look", "length": 0.03, "loss": 1.0, "layers": layers} for n in steps])
    for line in (line for axes in figure.axes for line in axes.get_lines()):
        at = line.get_xdata()
        assert [n for n in at if not math.isnan(n)] == steps
        assert math.isnan(at[4])
