"""Small IDX files for the tests, intact or damaged on purpose."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from experiments.data.idx import IdxFile

SHAPES = {
    "train-images-idx3-ubyte": (20, 3, 4),
    "train-labels-idx1-ubyte": (20,),
    "t10k-images-idx3-ubyte": (5, 3, 4),
    "t10k-labels-idx1-ubyte": (5,),
}


def idx_bytes(array: np.ndarray, *, magic: int | None = None, claim: tuple | None = None) -> bytes:
    """An IDX file of uint8; `magic` and `claim` (the shape in the header) can lie."""
    magic = 0x0800 | array.ndim if magic is None else magic
    shape = array.shape if claim is None else claim
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.tobytes()


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 10, shape, dtype=np.uint8, endpoint=False)
        for name, shape in SHAPES.items()
    }


def packed(array: np.ndarray) -> bytes:
    """An intact file as a mirror has it, each time the same."""
    return gzip.compress(idx_bytes(array), mtime=0)


def expected() -> tuple[IdxFile, ...]:
    """What intact files of `arrays` are."""
    return tuple(
        IdxFile(
            name,
            array.shape,
            hashlib.sha256(idx_bytes(array)).hexdigest(),
            hashlib.sha256(packed(array)).hexdigest(),
        )
        for name, array in arrays().items()
    )


def write_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        (folder / f"{name}.gz").write_bytes(packed(array))
