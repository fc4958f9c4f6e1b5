"""Meta-training: bookkeeping, non-finite values, and the same bits after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import METHODS, small_run

import metatele
from metatele.config import preset
from metatele.errors import CheckpointError, ConfigError, DivergedError, NotExactError, RunFolderError, SaveError
from metatele.training.flat import FlatTrainer
from metatele.training.run import METRICS_NAME, PREVIOUS_NAME, STATE_NAME, begun, read_state, train

ROOT = Path(__file__).resolve().parent.parent


def same(a, b):
    """Equal to the last bit, in nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("horizon", [6, 7])
def test_every_trajectory_runs_its_whole_horizon(staggered, horizon):
    config = small_run(horizon=horizon, unroll=3, staggered=staggered, batch=4, trajectories=40)
    trainer, ages, lives = FlatTrainer(config), [0] * 4, [[] for _ in range(4)]
    while not trainer.finished:
        steps = config.training.windows[trainer.update % len(config.training.windows)]
        before = trainer.trajectories.problems.inputs.clone()
        trainer.step()
        for i in range(4):
            ages[i] += steps
            if not torch.equal(before[i], trainer.trajectories.problems.inputs[i]):
                lives[i].append(ages[i])
                ages[i] = 0
    for life in lives:  # all but the first of a staggered trajectory are whole
        assert len(life) > 5
        assert set(life[1:]) == {horizon}
        assert staggered or life[0] == horizon
    if staggered:
        assert len({life[0] for life in lives}) > 1


def test_horizons_of_a_batch_may_differ():
    trainer = FlatTrainer(small_run(horizon=6, shorter=(2, 4), unroll=2, batch=6, trajectories=60, staggered=False))
    restarts = [0] * 6
    for _ in range(12):
        before = trainer.trajectories.problems.inputs.clone()
        trainer.step()
        for i in range(6):
            restarts[i] += not torch.equal(before[i], trainer.trajectories.problems.inputs[i])
    assert restarts == [4, 12, 6, 4, 12, 6]
    for shorter in ((3,), (8,), (0,)):
        with pytest.raises(ConfigError, match="shorter must be horizons"):
            small_run(horizon=6, unroll=2, shorter=shorter)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_held_out_loss(method):
    config = small_run(method=method, trajectories=400, batch=8, hidden=16, local_lr=1e-2, teleport_lr=1e-3)
    trainer = FlatTrainer(config)
    before, _ = trainer.validate()
    while not trainer.finished:
        trainer.step()
    after, losses = trainer.validate()
    assert after < before - 0.5
    assert math.isfinite(losses[6])


def test_streams_never_meet():
    trainer = FlatTrainer(small_run())
    draws = {
        stream: trainer.task.sample(0, stream, range(200)).inputs
        for stream in ("train", "validation", "evaluation", "tuning")
    }
    values = torch.cat([d.flatten() for d in draws.values()]).double()
    assert values.unique().numel() > 0.999 * values.numel()


@pytest.mark.parametrize("poison", ["weights", "gradient"])
def test_a_trajectory_that_is_not_finite_skips_the_update_and_is_replaced(poison):
    trainer = FlatTrainer(small_run(staggered=False))
    getattr(trainer.trajectories, poison)[1, 0] = float("nan")
    parameters = [p.clone() for p in trainer.optimizer.parameters()]
    kept = trainer.trajectories.problems.inputs.clone()
    metrics = trainer.step()
    assert metrics["skipped"] == trainer.skipped == 1
    assert metrics["lost_trajectories"] == 1
    assert all(torch.equal(a, b) for a, b in zip(parameters, trainer.optimizer.parameters(), strict=True))
    changed = (trainer.trajectories.problems.inputs != kept).flatten(1).any(1).tolist()
    assert changed == [False, True, False, False]
    assert trainer.step()["skipped"] == 1
    assert trainer.skipped_in_row == 0


def test_an_exploding_trajectory_is_replaced_and_the_update_is_made_without_it():
    config = small_run(staggered=False, lost_loss=1e4)
    trainer = FlatTrainer(config)
    trainer.trajectories.weights[1] *= 1e3
    kept = trainer.trajectories.problems.inputs.clone()
    metrics = trainer.step()
    assert metrics["skipped"] == 0
    assert metrics["lost_trajectories"] == 1
    assert math.isfinite(metrics["meta_gradient_norm"])
    changed = (trainer.trajectories.problems.inputs != kept).flatten(1).any(1).tolist()
    assert changed == [False, True, False, False]


def test_too_many_skips_in_a_row_stop_the_run_and_leave_the_checkpoint(tmp_path):
    config = small_run(max_skipped=3)
    train(config, tmp_path / "run", quiet=True)
    good = metatele.load(tmp_path / "run")
    trainer = FlatTrainer(config)
    with torch.no_grad():
        trainer.optimizer.local.lstm.head_bias.fill_(float("nan"))
    for _ in range(2):
        trainer.step()
    with pytest.raises(DivergedError, match="3 updates in a row"):
        trainer.step()
    assert same(dict(metatele.load(tmp_path / "run").optimizer.state_dict()), dict(good.optimizer.state_dict()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, method, average):
    config = small_run(method=method, average=average)
    whole = train(config, tmp_path / "whole", quiet=True)
    trainer = FlatTrainer(config)
    for _ in range(5):
        trainer.step()
    other = FlatTrainer(config)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    while not other.finished:
        other.step()
    ours, theirs = other.state_dict(), whole.state_dict()
    ours.pop("best")
    theirs.pop("best")
    assert same(ours, theirs)


def run_script(out, *flags, **options):
    command = [
        *(sys.executable, str(ROOT / "train_meta.py"), "quick", "--out", str(out), "--threads", "1"),
        *("--device", "cpu"),  # whose bits are the same again
        *("--hidden", "64", "--batch", "4", "--horizon", "6", "--unroll", "2", "--trajectories", "400"),
        *("--widths", "4,5,3", "--samples", "4", "--validation-trajectories", "4", "--validation-steps", "6"),
        *("--validation-score-at", "6", "--validation-every", "7", "--save-every", "5", "--log-every", "10"),
        *flags,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def outcome(folder):
    """What must not depend on kills: the state, the checkpoint's bytes, and the log but for times."""
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    for line in lines:
        line.pop("ms_per_trajectory_step", None)
    return read_state(folder), (folder / "checkpoint" / "model.safetensors").read_bytes(), lines


def test_killed_processes_resume_to_the_same_bits(tmp_path):
    finish(run_script(tmp_path / "whole"))
    kills = 0
    for attempt in range(40):
        process = run_script(tmp_path / "killed", *(["--resume"] if begun(tmp_path / "killed") else []))
        deadline = time.monotonic() + 2.0 + 0.37 * attempt
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            finish(process)
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 1
    for ours, theirs in zip(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"), strict=True):
        assert same(ours, theirs)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    train(small_run(), tmp_path, quiet=True)
    before = outcome(tmp_path)
    train(small_run(), tmp_path, resume=True, quiet=True)
    assert all(same(a, b) for a, b in zip(before, outcome(tmp_path), strict=True))


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    train(small_run(), tmp_path, quiet=True)
    content, rng = (tmp_path / STATE_NAME).read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(60):
        position, bit = (int(torch.randint(n, (), generator=rng)) for n in (len(content), 8))
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        (tmp_path / STATE_NAME).write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            read_state(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"action": "rescaling"}, {"action": "approximate"}, {"activation": "tanh"}])
@pytest.mark.parametrize("poison", ["weights", "gradient"])
def test_a_lost_network_never_stops_the_others(settings, poison):
    trainer = FlatTrainer(small_run(widths=(5, 5, 5, 3), samples=4, low=-0.2, high=0.2, staggered=False, **settings))
    getattr(trainer.trajectories, poison)[1, 0] = float("nan")
    assert trainer.step()["lost_trajectories"] == 1
    while not trainer.finished:
        metrics = trainer.step()
    assert metrics["skipped"] == 1
    assert math.isfinite(metrics["meta_loss"])


def test_settings_that_cannot_train_are_refused_at_once():
    with pytest.raises(ConfigError, match="lost_loss must be above the losses that trajectories begin with"):
        FlatTrainer(small_run(lost_loss=1.0))
    with pytest.raises(NotExactError, match=r"n <= 2 for widths \(4, 2, 3, 3\)"):
        FlatTrainer(small_run(widths=(4, 2, 3, 3)))
    with pytest.raises(ConfigError, match="needs a hidden layer"):
        FlatTrainer(small_run(widths=(4, 3)))


def test_a_log_that_cannot_be_written_is_one_error(tmp_path):
    train(small_run(), tmp_path, quiet=True)
    (tmp_path / METRICS_NAME).unlink()
    (tmp_path / METRICS_NAME).mkdir()
    with pytest.raises(SaveError, match="could not write"):
        train(small_run(), tmp_path, resume=True, quiet=True)


def test_a_damaged_log_does_not_stop_a_resume_and_a_foreign_one_is_not_touched(tmp_path):
    train(small_run(), tmp_path / "run", quiet=True)
    log = tmp_path / "run" / METRICS_NAME
    before = log.read_bytes()
    log.write_bytes(before + b'\xff\xfe\n3\n{"loss": 1}\n{"update": ')
    train(small_run(), tmp_path / "run", resume=True, quiet=True)
    assert log.read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / METRICS_NAME).write_bytes(before)
    with pytest.raises(RunFolderError, match="not empty"):
        train(small_run(), tmp_path / "mine", quiet=True)
    assert (tmp_path / "mine" / METRICS_NAME).read_bytes() == before


def test_a_run_of_which_nothing_is_finite_stops_with_a_message(tmp_path):
    with pytest.raises(DivergedError, match="updates in a row"):
        train(small_run(local_lr=1e38, clip=0.0, trajectories=400, max_skipped=5), tmp_path, quiet=True)


def test_what_a_run_killed_before_its_first_state_left_is_no_run(tmp_path):
    for name in (METRICS_NAME, f".{METRICS_NAME}.tmp", f".{STATE_NAME}.tmp"):
        (tmp_path / name).touch()
    train(small_run(), tmp_path, quiet=True)
    assert outcome(tmp_path)


def test_folders_that_hold_something_are_left_alone(tmp_path):
    train(small_run(), tmp_path / "run", quiet=True)
    with pytest.raises(RunFolderError, match="another run"):
        train(small_run(), tmp_path / "run", quiet=True)
    with pytest.raises(RunFolderError, match="other settings: seed is 5 here and 0 there"):
        train(small_run(seed=5), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(RunFolderError, match="other settings: hidden"):
        train(small_run(hidden=7), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(RunFolderError, match="no run to resume"):
        train(small_run(), tmp_path / "none", resume=True, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunFolderError, match=r"not empty \(it holds thesis.txt\)"):
        train(small_run(), tmp_path / "mine", quiet=True)
    with pytest.raises(RunFolderError, match="is a file"):
        train(small_run(), tmp_path / "mine" / "thesis.txt", quiet=True)


def test_damaged_states_are_one_error(tmp_path):
    train(small_run(), tmp_path, quiet=True)
    content = (tmp_path / STATE_NAME).read_bytes()
    for damage in (content[: len(content) // 2], b"", b"not a state"):
        for name in (STATE_NAME, PREVIOUS_NAME):
            (tmp_path / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match=f"{STATE_NAME} is damaged.*{PREVIOUS_NAME} is damaged"):
            train(small_run(), tmp_path, resume=True, quiet=True)
    torch.save({"format": 2}, tmp_path / STATE_NAME)
    with pytest.raises(CheckpointError, match="damaged"):
        train(small_run(), tmp_path, resume=True, quiet=True)


@pytest.mark.parametrize("damage", [b"", b"not a state", None], ids=["empty", "foreign", "missing"])
def test_a_run_goes_on_from_the_state_before_a_damaged_one(tmp_path, damage):
    train(small_run(), tmp_path, quiet=True)
    whole = outcome(tmp_path)
    if damage is None:  # killed between two renames
        (tmp_path / STATE_NAME).unlink()
    else:
        (tmp_path / STATE_NAME).write_bytes(damage)
    with pytest.warns(UserWarning, match="going on from training_state.previous.pt, update 9"):
        train(small_run(), tmp_path, resume=True, quiet=True)
    for ours, theirs in zip(outcome(tmp_path), whole, strict=True):
        assert same(ours, theirs)


def test_log_holds_what_is_promised(tmp_path):
    train(small_run(), tmp_path, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    logged = [line for line in lines if "meta_loss" in line]
    assert [line["update"] for line in logged] == [2, 4, 6, 8, 10, 12]
    for name in ("meta_gradient_norm", "skipped", "algebra_norm", "drift", "ms_per_trajectory_step", "update_norm"):
        assert all(math.isfinite(line[name]) for line in logged)
    assert any("validation_loss_at" in line for line in lines)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {"train/meta_loss", "train/drift", "train/algebra_norm", "validation/loss_at_6"} <= set(events["scalars"])
    assert "inner/log10_gradient" in events["histograms"]


def test_drift_of_the_exact_action_is_rounding():
    trainer = FlatTrainer(small_run(norm="fixed", radius=0.1, radius_decay=0.0))
    metrics = trainer.step(measure=True)
    assert metrics["algebra_norm"] == pytest.approx(0.1, rel=1e-5)
    assert metrics["drift"] < 1e-4


def test_presets_are_what_the_paper_says():
    for method, trajectories, steps in (("update-tele", 700, 100), ("update", 600, 100), ("lr-tele", 30, 300)):
        config = preset("paper", method)
        assert config.training.trajectories >= trajectories
        assert config.training.horizon == steps
        assert config.training.unroll == 10
        assert config.method.preprocessing == "raw"
        assert config.method.radius == 0.01
        assert config.training.objective == "sum"
        assert not config.method.gradient_rates
    assert preset("paper", "lr-tele").method.hidden == 20
    with pytest.raises(ConfigError, match="unroll must be at most the horizon"):
        preset("paper", unroll=200)


def test_a_run_that_computes_steps_anew_is_the_same_up_to_the_order_of_sums(tmp_path):
    plain, again = (train(small_run(remat=remat), tmp_path / str(remat), quiet=True) for remat in (False, True))
    for a, b in zip(plain.optimizer.parameters(), again.optimizer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
