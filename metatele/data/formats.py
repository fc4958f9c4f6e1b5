"""The two binary layouts image sets come in: IDX (MNIST and its kin) and CIFAR-10's records."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from metatele.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, rank: int) -> np.ndarray:
    """An IDX file of unsigned bytes, raw or gzipped (by its first bytes, not its name).

    Layout: two zero bytes, the type (8: unsigned byte), the rank, one big-endian 32-bit size for each
    dimension, then the bytes. A gzipped file's checksum is verified as it is read.

    Args:
        path: The file.
        rank: Expected number of dimensions: 3 for images, 1 for labels.

    Returns:
        uint8, of the shape the file names.

    Raises:
        DataError: Unreadable, truncated, too long, or not such a file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "labels-idx1-ubyte"
        ...     _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        ...     read_idx(file, rank=1)
        array([7, 9], dtype=uint8)
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path} is not an IDX file: it should begin with two zero bytes")
    if content[2] != _UNSIGNED_BYTE or content[3] != rank:
        raise DataError(
            f"{path} should hold unsigned bytes (8) in {rank} dimension(s), its header says type {content[2]} "
            f"and {content[3]}"
        )
    begin = 4 + 4 * rank
    if len(content) < begin:
        raise DataError(f"{path} ends within its header")
    shape = struct.unpack(f">{rank}I", content[4:begin])
    expected = begin + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path} should hold {expected} bytes for shape {shape}, it has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _content(path: Path) -> bytes:
    """A file's bytes, gunzipped if its first bytes say so."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read, it is damaged or truncated: {error}") from error


def read_records(path: Path, label_bytes: int, image_bytes: int, records: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's binary layout, raw or gzipped: for each image its label, then its bytes, channel by channel.

    Args:
        path: The file.
        label_bytes: Bytes of a label: 1 for CIFAR-10, 2 for CIFAR-100.
        image_bytes: Bytes of an image.
        records: How many the file should hold.

    Returns:
        Images ``[n, image_bytes]`` and labels ``[n]`` (the last label byte), both uint8.

    Raises:
        DataError: Unreadable, truncated or too long.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "batch.bin"
        ...     _ = file.write_bytes(bytes([3, 10, 20, 5, 30, 40]))
        ...     read_records(file, label_bytes=1, image_bytes=2, records=2)[1]
        array([3, 5], dtype=uint8)
    """
    content = np.frombuffer(_content(path), np.uint8)
    size = label_bytes + image_bytes
    if len(content) != records * size:
        raise DataError(f"{path} should hold {records} records of {size} bytes, it has {len(content)} bytes")
    rows = content.reshape(-1, size)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]
