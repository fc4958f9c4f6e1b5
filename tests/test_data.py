"""Image sets: what is read is what was written; every kind of damage is one clear error."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from metatele.data import load_images
from metatele.data.formats import read_idx, read_records
from metatele.errors import DataError

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def random_arrays(train=7, test=3):
    rng = np.random.default_rng(0)
    sizes = ((train, 28, 28), (train,), (test, 28, 28), (test,))
    return [rng.integers(0, 10 if len(s) == 1 else 256, s, np.uint8) for s in sizes]


def write_mnist(root, arrays, compress=True, folder="MNIST/raw"):
    where = root / folder
    where.mkdir(parents=True)
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        content = idx_bytes(array)
        (where / (name + ".gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)
    return where


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_files_are_read_as_written(tmp_path, compress, name, folder):
    arrays = random_arrays()
    write_mnist(tmp_path, arrays, compress, folder)
    images = load_images(name, tmp_path)
    assert torch.equal((images.train_images * 255).round().byte(), torch.from_numpy(arrays[0].reshape(7, 784)))
    assert torch.equal(images.test_labels, torch.from_numpy(arrays[3]).long())
    assert images.train_images.dtype == torch.float32
    assert 0 <= float(images.train_images.min()) <= float(images.train_images.max()) <= 1


def test_cifar_records_are_read_as_written(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    written = []
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = np.tile(rng.integers(0, 256, (100, 3073), np.uint8), (100, 1))
        rows[:, 0] = rng.integers(0, 10, 10_000, np.uint8)
        if name == "data_batch_2.bin":
            (folder / (name + ".gz")).write_bytes(gzip.compress(rows.tobytes(), 1))
        else:
            rows.tofile(folder / name)
        written.append(rows)
    images = load_images("cifar10", tmp_path)
    rows = np.concatenate(written[:5])
    assert torch.equal((images.train_images * 255).round().byte(), torch.from_numpy(rows[:, 1:]))
    assert torch.equal(images.train_labels, torch.from_numpy(rows[:, 0]).long())
    assert len(images.test_labels) == 10_000


def test_data_root_may_come_from_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path, random_arrays())
    monkeypatch.setenv("METATELE_DATA", str(tmp_path))
    assert len(load_images("mnist").train_labels) == 7


def test_same_data_same_digest(tmp_path):
    arrays = random_arrays()
    write_mnist(tmp_path / "one", arrays, compress=True)
    write_mnist(tmp_path / "two", arrays, compress=False)
    arrays[0][0, 3, 3] ^= 1
    write_mnist(tmp_path / "three", arrays)
    one, two, three = (load_images("mnist", tmp_path / n).sha256 for n in ("one", "two", "three"))
    assert one == two != three


def test_digits_need_no_file_and_split_every_class():
    digits = load_images()
    for labels in (digits.train_labels, digits.test_labels):
        assert labels.bincount(minlength=10).min() > 20
    assert digits.features == 64


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-1], "bytes for shape"),
        (lambda b: b + b"\0", "bytes for shape"),
        (lambda b: b"\1" + b[1:], "not an IDX file"),
        (lambda b: b[:3] + b"\2" + b[4:], "dimension"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "unsigned bytes"),
        (lambda b: b[:6], "ends within its header"),
        (lambda b: b"", "not an IDX file"),
        (lambda b: gzip.compress(b)[:-9], "damaged or truncated"),
        (lambda b: gzip.compress(b)[:-8] + b"\0" * 8, "damaged or truncated"),
    ],
)
def test_damaged_idx_files_are_one_clear_error(tmp_path, damage, words):
    path = tmp_path / "images"
    path.write_bytes(damage(idx_bytes(np.zeros((2, 28, 28), np.uint8))))
    with pytest.raises(DataError, match=words) as error:
        read_idx(path, 3)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_records_must_be_whole(tmp_path):
    path = tmp_path / "batch.bin"
    path.write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(DataError, match="2 records of 3073 bytes, it has 6145"):
        read_records(path, 1, 3072, 2)
    path.write_bytes(bytes(3073))
    with pytest.raises(DataError, match="2 records"):
        read_records(path, 1, 3072, 2)
    path.write_bytes(gzip.compress(bytes(3073 * 2))[:-5])
    with pytest.raises(DataError, match="damaged or truncated"):
        read_records(path, 1, 3072, 2)


def test_wrong_contents_are_named(tmp_path):
    arrays = random_arrays()
    arrays[1][0] = 10
    write_mnist(tmp_path / "labels", arrays)
    with pytest.raises(DataError, match="label is 10"):
        load_images("mnist", tmp_path / "labels")
    write_mnist(tmp_path / "counts", [*random_arrays()[:3], np.zeros(5, np.uint8)])
    with pytest.raises(DataError, match="3 test images, but 5 labels"):
        load_images("mnist", tmp_path / "counts")
    write_mnist(tmp_path / "sizes", [np.zeros((7, 27, 28), np.uint8), *random_arrays()[1:]])
    with pytest.raises(DataError, match="28 x 28"):
        load_images("mnist", tmp_path / "sizes")


def test_missing_files_say_which_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv("METATELE_DATA", raising=False)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*METATELE_DATA"):
        load_images("mnist")
    with pytest.raises(DataError, match=r"data_batch_1\.bin") as error:
        load_images("cifar10", tmp_path)
    assert str(tmp_path / "cifar-10-batches-bin") in str(error.value)
    (write_mnist(tmp_path, random_arrays()) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_images("mnist", tmp_path)
    with pytest.raises(DataError, match="dataset must be one of"):
        load_images("imagenet")


REAL = os.environ.get("METATELE_DATA", "")


@pytest.mark.skipif(not (REAL and Path(REAL).is_dir()), reason="METATELE_DATA names no folder of MNIST files")
def test_real_mnist_has_its_sizes():
    images = load_images("mnist", REAL)
    assert images.train_images.shape == (60_000, 784)
    assert images.test_images.shape == (10_000, 784)
    assert images.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
