"""Data sets of handwritten digits as arrays in memory.

`load("auto")` takes MNIST from a folder, from the cache or from the network, and where there is
none scikit-learn's bundled digits, with a notice that every result has to carry.
"""

import functools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.download import download
from experiments.data.idx import IdxFile, find_idx, read_idx
from experiments.output.errors import DataError

DatasetName = Literal["auto", "mnist", "digits"]

DATA_DIR_VARIABLE = "MNIST_DIR"

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)

# Training images, training labels, test images, test labels.
MNIST_FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)

DIGIT_NAMES = tuple(str(digit) for digit in range(10))

_DIGITS_TEST_SIZE = 360


@dataclass(frozen=True)
class Dataset:
    """Images of one size with a class each, split into training and test examples.

    Attributes:
      name: "mnist" or "digits".
      source: where it came from, for people to read.
      train_images: uint8 `[n, height, width]`.
      train_labels: int32 `[n]`, indices into `class_names`.
      test_images: uint8 `[m, height, width]`.
      test_labels: int32 `[m]`.
      class_names: one name per class.
      notice: what every result has to say about the data; empty where there is nothing to say.
      reason: why the notice is needed, for the console.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...] = DIGIT_NAMES
    notice: str = ""
    reason: str = ""

    @property
    def features(self) -> int:
        """Pixels per image."""
        return int(np.prod(self.train_images.shape[1:]))

    @property
    def summary(self) -> str:
        """Name, sizes and source in one line."""
        height, width = self.train_images.shape[1:]
        return (
            f"{self.name}: {len(self.train_labels)} training and {len(self.test_labels)} test "
            f"images of {height}x{width}, from {self.source}"
        )

    @property
    def checksum(self) -> int:
        """A number that tells other data apart."""
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return functools.reduce(lambda sum_, array: zlib.crc32(array.data, sum_), arrays, 0)

    def parity(self) -> "Dataset":
        """The same images, to be told apart as even (0) and odd (1)."""
        return replace(
            self,
            train_labels=self.train_labels % 2,
            test_labels=self.test_labels % 2,
            class_names=("even", "odd"),
        )


def load(name: DatasetName, data_dir: Path | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: "mnist", "digits", or "auto": MNIST where it can be had, otherwise the digits.
      data_dir: folder of the MNIST files, by default what the environment variable MNIST_DIR names.
        Where there is one it has to hold them, intact: a folder that somebody names is never
        silently replaced by something else.

    Raises:
      DataError: MNIST was asked for, or a folder of it named, and it is missing or damaged.
    """
    if name == "digits":
        return load_digits()
    data_dir = data_dir or _named_folder()
    if data_dir is not None:
        return read_mnist(data_dir)
    try:
        return fetch_mnist(mirrors=MIRRORS)
    except DataError as error:
        if name == "auto":
            return replace(
                load_digits(),
                notice="NOT MNIST: scikit-learn's 8x8 digits stand in for it",
                reason=str(error),
            )
        raise DataError(
            f"{error}. Put the four MNIST files into a folder and name it with --data-dir or "
            f"${DATA_DIR_VARIABLE}, or train on --dataset digits"
        ) from error


def read_mnist(folder: Path, files: Sequence[IdxFile] = MNIST_FILES) -> Dataset:
    """Reads MNIST from a folder, each file plain or with `.gz` at the end.

    Raises:
      DataError: a file is missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of MNIST files")
    paths = [find_idx(folder, file.name) for file in files]
    missing = [file.name for file, path in zip(files, paths, strict=True) if path is None]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)} (plain or .gz)")
    found = [path for path in paths if path is not None]
    train_images, train_labels, test_images, test_labels = map(read_idx, found, files)
    return Dataset(
        name="mnist",
        source=str(folder),
        train_images=train_images,
        train_labels=train_labels.astype(np.int32),
        test_images=test_images,
        test_labels=test_labels.astype(np.int32),
    )


def fetch_mnist(
    cache: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    files: Sequence[IdxFile] = MNIST_FILES,
    timeout: float = 5.0,
) -> Dataset:
    """Reads MNIST from the cache folder, after downloading what is missing or damaged there.

    Args:
      cache: folder of the downloaded files; by default in the user's cache folder.
      mirrors: base URLs, tried in this order.
      files: what to fetch.
      timeout: seconds that a mirror may stay silent.

    Raises:
      DataError: a file is not in the cache and no mirror delivers it.
    """
    # Imported here because a run on files in a named folder need not wait for it.
    import pooch

    cache = cache or pooch.os_cache("ce_jax") / "mnist"
    for file in files:
        download(f"{file.name}.gz", file.gzip_sha256, cache, mirrors, timeout=timeout)
    return read_mnist(cache, files)


def load_digits() -> Dataset:
    """The 1797 8x8 digits that come with scikit-learn, one fifth of them (360) for testing."""
    # Imported here because it takes a second that a run on MNIST need not wait for.
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    # In the order of the file neighbours were written by the same hand; the shuffle is fixed, so
    # that all runs are judged by the same examples.
    order = np.random.default_rng(0).permutation(len(labels))
    images = images.reshape(-1, 8, 8).astype(np.uint8)[order]
    labels = labels.astype(np.int32)[order]
    return Dataset(
        name="digits",
        source="scikit-learn",
        train_images=images[_DIGITS_TEST_SIZE:],
        train_labels=labels[_DIGITS_TEST_SIZE:],
        test_images=images[:_DIGITS_TEST_SIZE],
        test_labels=labels[:_DIGITS_TEST_SIZE],
    )


def _named_folder() -> Path | None:
    folder = os.environ.get(DATA_DIR_VARIABLE)
    return Path(folder) if folder else None
