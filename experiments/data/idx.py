"""Reading IDX files (the format of MNIST), plain or gzip, trusting nothing a file says.

A file is read in bounded steps: its header, then at most one byte past the data that the header
claims, and a header may not claim more than an intact file holds. So a wrong file costs a few
bytes, and a gzip that unpacks to terabytes costs no more than an intact one.
"""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from experiments.output.errors import DataError

# The third byte of an IDX magic number names the element type; unsigned bytes are all MNIST uses.
_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class IdxFile:
    """What is known of a file before it is opened.

    Attributes:
      name: file name without `.gz`.
      shape: the dimensions it has to have.
      sha256: hex digest of the unpacked bytes, header included.
      gzip_sha256: hex digest of the packed file on the mirrors. It holds for a download alone:
        another program packs the same bytes into another file.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str
    gzip_sha256: str

    @property
    def magic(self) -> int:
        """Element type and number of dimensions, as the first four bytes of the file say it."""
        return _UNSIGNED_BYTE << 8 | len(self.shape)

    @property
    def header_bytes(self) -> int:
        """Length of the header: the magic number and one word per dimension."""
        return 4 + 4 * len(self.shape)


def find_idx(folder: Path, name: str) -> Path | None:
    """Returns the path of `name` or `name.gz` in `folder`, or None where there is neither."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def read_idx(path: Path, expected: IdxFile) -> np.ndarray:
    """Reads one file and checks it in full.

    Args:
      path: the file; it is unpacked on the way where its name ends in `.gz`.
      expected: what it has to be.

    Returns:
      A read-only uint8 array of shape `expected.shape`.

    Raises:
      DataError: it cannot be read or is not what was expected; the message names the file.
    """
    array, digest = _unpack(path, expected)
    if array.shape != expected.shape:
        raise DataError(
            f"{path}: it holds shape {array.shape}, but {expected.name} has {expected.shape}"
        )
    if digest != expected.sha256:
        raise DataError(
            f"{path}: wrong checksum, the SHA-256 of its unpacked bytes is {digest}, "
            f"wanted {expected.sha256}"
        )
    return array


def _unpack(path: Path, expected: IdxFile) -> tuple[np.ndarray, str]:
    """Returns the array and the SHA-256 of a file whose structure is sound."""
    try:
        with _open(path) as stream:
            header = stream.read(expected.header_bytes)
            shape = _parse_header(path, header, expected)
            claimed = math.prod(shape)
            if claimed > math.prod(expected.shape):
                raise DataError(
                    f"{path}: its header claims {claimed} bytes of data (shape {shape}), more than "
                    f"the shape {expected.shape} of {expected.name}"
                )
            body = stream.read(claimed + 1)
    except EOFError as error:
        raise DataError(f"{path}: truncated gzip, it ends before its last block") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(body) < claimed:
        raise DataError(
            f"{path}: its header claims {claimed} bytes of data (shape {shape}), "
            f"but it holds {len(body)}"
        )
    if len(body) > claimed:
        raise DataError(
            f"{path}: it unpacks past the {claimed} bytes of data its header claims (shape {shape})"
        )
    digest = hashlib.sha256(header)
    digest.update(body)
    return np.frombuffer(body, np.uint8).reshape(shape), digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _parse_header(path: Path, header: bytes, expected: IdxFile) -> tuple[int, ...]:
    # The magic number comes first: a file of another kind may be shorter than this header.
    magic = int.from_bytes(header[:4], "big")
    if len(header) >= 4 and magic != expected.magic:
        raise DataError(f"{path}: wrong magic number {magic:#010x}, wanted {expected.magic:#010x}")
    if len(header) < expected.header_bytes:
        raise DataError(
            f"{path}: too short for an IDX header, "
            f"it holds {len(header)} of {expected.header_bytes} bytes"
        )
    return struct.unpack(f">{len(expected.shape)}I", header[4:])
