"""A checkpoint comes back as it was saved; anything else is one clear error and nothing is lost."""

import json
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import METHODS, small_optimizer, small_problems, small_run

import metatele
from metatele import checkpoint
from metatele.config import FlatRunConfig, MethodConfig, TaskConfig, from_dict, preset, to_dict
from metatele.errors import CheckpointError, ConfigError, SaveError
from metatele.files import replace_folder, write_atomically


@pytest.fixture
def saved(tmp_path):
    optimizer = small_optimizer(dtype=torch.float32)
    checkpoint.save(tmp_path / "c", optimizer, run=small_run(), progress={"update": 3}, scores={"x": 1.0})
    return optimizer, tmp_path / "c"


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_checkpoint_computes_the_same(tmp_path, method):
    optimizer, problems = small_optimizer(method, dtype=torch.float32), small_problems(dtype=torch.float32)
    metatele.save(tmp_path / "c", optimizer)
    loaded = metatele.load(tmp_path / "c")
    assert loaded.method == optimizer.config
    assert loaded.task == optimizer.task
    steps = [
        o.step(problems.initial, problems.initial, o.initial_states(3), problems.inputs).weights
        for o in (optimizer, loaded.optimizer)
    ]
    assert torch.equal(*steps)
    assert not any(p.requires_grad for p in loaded.optimizer.parameters())


def test_a_run_folder_stands_for_its_checkpoint(saved, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(saved[1], tmp_path / "run" / "checkpoint")
    assert metatele.load(tmp_path / "run").training["update"] == 3
    assert metatele.load(saved[1]).scores == {"x": 1.0}


def fails(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        metatele.load(path)
    assert "\n" not in str(caught.value)


def test_missing_checkpoints_are_one_error(tmp_path, saved):
    fails(tmp_path / "nowhere", "does not exist")
    fails(tmp_path, "expected config.json")
    (saved[1] / "model.safetensors").unlink()
    fails(saved[1], "cannot be read")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_models_are_one_error(saved, keep):
    file = saved[1] / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    fails(saved[1], "empty|damaged")


def test_every_single_flipped_bit_is_noticed(saved):
    rng = torch.Generator().manual_seed(0)
    for name in ("model.safetensors", "config.json"):
        file = saved[1] / name
        content = file.read_bytes()
        for _ in range(200):
            position, bit = (int(torch.randint(n, (), generator=rng)) for n in (len(content), 8))
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            try:
                loaded = metatele.load(saved[1])
            except CheckpointError:
                continue
            # A flip among the white space between JSON values changes nothing that is read.
            assert name == "config.json"
            assert json.loads(changed) == json.loads(content)
            assert loaded.method == saved[0].config
        file.write_bytes(content)


def test_pickles_are_not_executed(saved, tmp_path):
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    (saved[1] / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    fails(saved[1], "damaged")
    rewrite(saved[1], {})
    fails(saved[1], "usable")
    assert not trap.exists()


def rewrite(folder, changes):
    """Change the configuration and make both checksums right again."""
    import hashlib

    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    config["model_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config["sha256"] = checkpoint._digest(config)
    file.write_text(json.dumps(config))


def test_future_foreign_and_unfitting_checkpoints_are_one_error(saved):
    folder = saved[1]
    original = json.loads((folder / "config.json").read_text())
    for changes, match in (
        ({"format": 2}, "upgrade metatele"),
        ({"package": "other"}, "not written by metatele"),
        ({"method": {**original["method"], "hidden": 7}}, "usable"),
        ({"method": {**original["method"], "method": "rotate"}}, "must be one of"),
        ({"method": {**original["method"], "new": 1}}, "no field 'new'"),
        ({"task": {"widths": [4]}}, "widths must be at least two"),
        ({"method": 3}, "mapping"),
        ({"family": "square"}, "family must be one of flat, equivariant"),
    ):
        rewrite(folder, {**original, **changes})
        fails(folder, match)
    (folder / "config.json").write_text("[]")
    fails(folder, "not written by metatele")
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    fails(folder, "JSON")


def test_weights_that_are_not_finite_are_one_error(saved):
    tensors = safetensors.torch.load_file(saved[1] / "model.safetensors")
    tensors["local.lstm.head_bias"][2] = float("nan")
    safetensors.torch.save_file(tensors, saved[1] / "model.safetensors")
    rewrite(saved[1], {})
    fails(saved[1], "not finite, in local.lstm.head_bias")


def test_a_full_disk_is_one_error_and_leaves_the_earlier_files(tmp_path):
    """A file-size limit makes the system refuse the write, as a full disk does."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {[str(p) for p in (Path(__file__).parent, Path(__file__).parent.parent)]!r}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from cases import small_optimizer, small_run
import metatele
from metatele.errors import SaveError
from metatele.training.run import train
from pathlib import Path
out = Path({str(tmp_path)!r})
metatele.save(out / "c", small_optimizer())
train(small_run(trajectories=4), out / "run", quiet=True)
before = {{p: p.read_bytes() for p in out.rglob("*") if p.is_file()}}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for attempt in (
    lambda: metatele.save(out / "c", small_optimizer(seed=1)),
    lambda: train(small_run(), out / "other", quiet=True),
):
    try:
        attempt()
    except SaveError as error:
        print("SAVE ERROR:", error)
assert {{p: p.read_bytes() for p in before}} == before
assert metatele.load(out / "c") and metatele.load(out / "run")
print("intact")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SAVE ERROR: could not write") == 2
    assert done.stdout.endswith("intact\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


def test_folders_with_other_files_are_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(SaveError, match="something other"):
            metatele.save(path, small_optimizer())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_checkpoint_saved_before_a_setting_existed_still_loads(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    config["method"].pop("teleport_head")
    rewrite(saved[1], {"method": config["method"]})
    assert metatele.load(saved[1]).method == saved[0].config


def test_the_current_folder_is_a_path_like_any_other(saved, monkeypatch):
    monkeypatch.chdir(saved[1])
    assert metatele.load(".").method == saved[0].config
    metatele.save(".", saved[0])


def test_an_interrupted_replacement_leaves_the_earlier_folder_readable(saved):
    saved[1].rename(saved[1].with_name("c.previous"))  # killed between the two renames
    assert metatele.load(saved[1]).training["update"] == 3
    checkpoint.save(saved[1], saved[0], progress={"update": 4})
    assert metatele.load(saved[1]).training["update"] == 4


def test_unwritable_places_are_one_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="could not write"):
        write_atomically(tmp_path / "file" / "below", b"y")
    with pytest.raises(SaveError, match="could not write"):
        replace_folder(tmp_path / "file" / "below", {"a": b"y"})
    assert (tmp_path / "file").read_text() == "x"


def test_configurations_round_trip_and_refuse_what_is_wrong():
    config = preset("paper", "lr-tele", seed=3)
    assert from_dict(FlatRunConfig, json.loads(json.dumps(to_dict(config)))) == config
    for changes in (
        {"unroll": 101},
        {"batch": 0},
        {"hidden": -1},
        {"hidden": 2.5},
        {"bias": 1},
        {"preprocessing": "log"},
        {"radius": 0.6},
        {"clip": -1.0},
        {"average": 1.0},
        {"widths": (3,)},
        {"widths": (3, 0, 2)},
        {"low": 2.0},
        {"rate_low": 1.0},
        {"local_lr": float("nan")},
        {"validation_score_at": (1000,)},
        {"nonsense": 1},
        {"seed": -1},
    ):
        with pytest.raises(ConfigError) as caught:
            preset("paper", **changes)
        assert "\n" not in str(caught.value)
    for name, method in (("worst", "update"), ("best", "updat")):
        with pytest.raises(ConfigError, match="must be one of"):
            preset(name, method)
    with pytest.raises(ConfigError, match="positive"):
        TaskConfig(samples=0)
    with pytest.raises(ConfigError, match="type int"):
        MethodConfig(layers=True)
