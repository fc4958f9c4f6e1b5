"""Image sets by name, from files on disk or, for ``digits``, from scikit-learn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metatele.data.formats import read_idx, read_records
from metatele.errors import DataError
from metatele.extras import require_modules

ROOT_VARIABLE = "METATELE_DATA"
_CLASSES = 10
_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR_10"}


@dataclass(frozen=True)
class ImageSet:
    """Training and test images of a ten-class problem.

    Attributes:
        name: One of :data:`DATASETS`.
        train_images: ``[n, d]`` in [0, 1], float32, one row per image.
        train_labels: ``[n]``, int64, from 0 to 9.
        test_images: As above.
        test_labels: As above.
        sha256: Of all pixels and labels as bytes, so that results can say what they were made from.

    Example:
        >>> digits = load_images("digits")
        >>> digits.features, digits.classes, float(digits.train_images.max())
        (64, 10, 1.0)
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    sha256: str

    @property
    def features(self) -> int:
        """Pixels (times channels) of an image."""
        return self.train_images.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return _CLASSES


_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def load_images(name: str = "digits", root: str | Path | None = None, download: bool = False) -> ImageSet:
    """An image set by name.

    Args:
        name: ``digits`` (8x8, in scikit-learn, no files needed), ``mnist``, ``fashion-mnist``, ``cifar10``.
        root: Folder with the files; the environment variable ``METATELE_DATA`` if not given.
        download: Fetch from OpenML, by scikit-learn, if the files are not there.

    Returns:
        Images as rows of numbers in [0, 1]; CIFAR-10's channel by channel.

    Raises:
        DataError: Unknown name, missing files (which, and where they were looked for) or damaged ones.

    Example:
        >>> digits = load_images("digits")
        >>> digits.train_images.shape, digits.test_images.shape
        (torch.Size([1437, 64]), torch.Size([360, 64]))
    """
    if name not in DATASETS:
        raise DataError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    where = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if name == "digits":
        arrays = _digits()
    else:
        try:
            arrays = DATASETS[name](Path(where) if where else None)
        except _MissingError as error:
            if not download:
                raise DataError(
                    f"{error}; give the folder with --data-root or {ROOT_VARIABLE}, or fetch them with --download",
                    page="docs/does-it-help.md#teleports-by-hand",
                ) from None
            arrays = _download(name)
    return _checked(name, arrays)


class _MissingError(Exception):
    pass


def _digits() -> _Arrays:
    require_modules("the set digits", "sklearn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.data * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 0  # neighbours share a writer, so every fifth rather than the last
    return images[~test], labels[~test], images[test], labels[test]


def _find(root: Path | None, folders: tuple[str, ...], files: tuple[str, ...], what: str) -> list[Path]:
    """The files, gzipped or not, all in the first folder that holds any."""
    names = ", ".join(files)
    if root is None:
        raise _MissingError(f"{what} needs the files {names}")
    for folder in (root / f for f in folders):
        found = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in files]
        if any(found):
            for name, path in zip(files, found, strict=True):
                if path is None:
                    raise DataError(f"{folder} holds only a part of {what}: {name} (or {name}.gz) is missing")
            return [p for p in found if p is not None]
    looked = ", ".join(str(root / f) for f in folders)
    raise _MissingError(f"{what} needs the files {names} (each may end in .gz) in one of {looked}")


_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx(folders: tuple[str, ...], what: str) -> Callable[[Path | None], _Arrays]:
    def read(root: Path | None) -> _Arrays:
        train_x, train_y, test_x, test_y = _find(root, folders, _IDX_FILES, what)
        images = [read_idx(path, 3) for path in (train_x, test_x)]
        for path, found in zip((train_x, test_x), images, strict=True):
            if found.shape[1:] != (28, 28):
                raise DataError(f"{path} should hold images of 28 x 28, they are {found.shape[1]} x {found.shape[2]}")
        flat = [i.reshape(len(i), 784) for i in images]
        return flat[0], read_idx(train_y, 1), flat[1], read_idx(test_y, 1)

    return read


def _cifar10(root: Path | None) -> _Arrays:
    files = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    paths = _find(root, ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."), files, "CIFAR-10")
    parts = [read_records(path, 1, 3 * 32 * 32, 10_000) for path in paths]
    images, labels = (np.concatenate([part[k] for part in parts[:-1]]) for k in (0, 1))
    return images, labels, *parts[-1]


def _download(name: str) -> _Arrays:
    require_modules("a download", "sklearn")
    from sklearn.datasets import fetch_openml

    try:
        images, labels = fetch_openml(_OPENML[name], version=1, return_X_y=True, as_frame=False, parser="auto")
    except Exception as error:  # network, cache and parser errors of many kinds
        raise DataError(f"{name} could not be downloaded from OpenML: {error}") from error
    images, labels = images.astype(np.uint8), labels.astype(np.uint8)
    end = len(labels) - 10_000  # all three come with their test images last
    return images[:end], labels[:end], images[end:], labels[end:]


DATASETS: dict[str, Callable[[Path | None], _Arrays]] = {
    "digits": lambda _: _digits(),
    "mnist": _idx(("MNIST/raw", "mnist", "MNIST", "."), "MNIST"),
    "fashion-mnist": _idx(("FashionMNIST/raw", "fashion-mnist", "FashionMNIST"), "Fashion-MNIST"),
    "cifar10": _cifar10,
}


def _checked(name: str, arrays: _Arrays) -> ImageSet:
    digest = hashlib.sha256()
    for split, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels):
            raise DataError(f"{name}: {len(images)} {split} images, but {len(labels)} labels")
        if not len(labels):
            raise DataError(f"{name}: there are no {split} images")
        if labels.max() >= _CLASSES:
            raise DataError(f"{name}: a {split} label is {labels.max()}, expected 0 to {_CLASSES - 1}")
        digest.update(np.ascontiguousarray(images).tobytes())
        digest.update(np.ascontiguousarray(labels).tobytes())
    train_x, train_y, test_x, test_y = arrays
    return ImageSet(
        name,
        _unit(train_x),
        torch.from_numpy(train_y.astype(np.int64)),
        _unit(test_x),
        torch.from_numpy(test_y.astype(np.int64)),
        digest.hexdigest(),
    )


def _unit(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(255)
