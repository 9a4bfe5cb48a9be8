import builtins
import gzip
import math
import tracemalloc

import numpy as np
import pytest

from experiments.data.datasets import MNIST_FILES, read_mnist
from experiments.data.idx import find_idx, read_idx
from experiments.output.errors import DataError
from tests.experiments.idx_files import arrays, expected, idx_bytes, write_all

IMAGES = expected()[0]
ARRAY = arrays()[IMAGES.name]
INTACT = idx_bytes(ARRAY)


def write(folder, content, *, compress=True):
    path = folder / (f"{IMAGES.name}.gz" if compress else IMAGES.name)
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@pytest.mark.parametrize("compress", [True, False])
def test_reads_an_intact_file(tmp_path, compress):
    path = write(tmp_path, INTACT, compress=compress)
    assert find_idx(tmp_path, IMAGES.name) == path
    np.testing.assert_array_equal(read_idx(path, IMAGES), ARRAY)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "too short for an IDX header, it holds 0 of 16", id="empty"),
        pytest.param(INTACT[:9], "too short for an IDX header, it holds 9 of 16", id="header"),
        pytest.param(
            idx_bytes(ARRAY, magic=0x0801),
            "wrong magic number 0x00000801, wanted 0x00000803",
            id="magic of labels",
        ),
        pytest.param(b"<html>404 not found</html>", "wrong magic number", id="html"),
        pytest.param(INTACT[:-7], r"claims 240 bytes .* but it holds 233", id="cut"),
        pytest.param(
            idx_bytes(ARRAY[:10], claim=(20, 3, 4)),
            "claims 240 bytes .* but it holds 120",
            id="claims more than it holds",
        ),
        pytest.param(
            idx_bytes(ARRAY, claim=(2**32 - 1, 3, 4)),
            r"claims \d+ bytes .*, more than the shape",
            id="claims more than there can be",
        ),
        pytest.param(
            idx_bytes(ARRAY, claim=(2**32 - 1,) * 3),
            r"claims \d+ bytes .*, more than the shape",
            id="claims more than a machine can hold",
        ),
        pytest.param(INTACT + b"x", "unpacks past the 240 bytes", id="longer than it claims"),
        pytest.param(idx_bytes(ARRAY[:19]), r"holds shape \(19, 3, 4\), but", id="fewer examples"),
        pytest.param(
            idx_bytes(ARRAY.reshape(20, 4, 3)), r"holds shape \(20, 4, 3\), but", id="turned"
        ),
        pytest.param(idx_bytes(ARRAY[::-1]), "wrong checksum", id="other content"),
    ],
)
def test_names_the_damaged_file(tmp_path, content, message, compress):
    path = write(tmp_path, content, compress=compress)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, IMAGES)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("kept", [1, 5, 12, 60, -9, -1])
def test_truncated_gzip(tmp_path, kept):
    path = write(tmp_path, INTACT)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"(truncated|damaged) gzip") as error:
        read_idx(path, IMAGES)
    assert str(error.value).startswith(str(path))


def test_gzip_that_is_none(tmp_path):
    path = tmp_path / f"{IMAGES.name}.gz"
    path.write_bytes(INTACT)
    with pytest.raises(DataError, match="damaged gzip"):
        read_idx(path, IMAGES)


def test_gzip_with_flipped_bits(tmp_path):
    content = bytearray(gzip.compress(np.random.default_rng(0).bytes(300)))
    content[40] ^= 0xFF
    path = tmp_path / f"{IMAGES.name}.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_idx(path, IMAGES)
    assert str(error.value).startswith(str(path))


def test_gzip_that_unpacks_without_end_costs_little(tmp_path):
    path = write(tmp_path, INTACT + bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="unpacks past the 240 bytes"):
            read_idx(path, IMAGES)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_wrong_magic_stops_the_reading_at_the_header(tmp_path, monkeypatch):
    path = write(tmp_path, b"\0" * 1000, compress=False)
    sizes = []
    original = builtins.open

    class Recorder:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            sizes.append(size)
            return self.file.read(size)

    monkeypatch.setattr(
        "experiments.data.idx._open", lambda path: Recorder(original(path, "rb", buffering=0))
    )
    with pytest.raises(DataError, match="magic"):
        read_idx(path, IMAGES)
    assert sizes == [16]


def test_unreadable_file(tmp_path):
    folder = tmp_path / IMAGES.name
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_idx(folder, IMAGES)


def test_too_few_labels_name_their_file(tmp_path):
    write_all(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx_bytes(arrays()["train-labels-idx1-ubyte"][:-1])))
    message = r"labels.*: it holds shape \(19,\), but train-labels-idx1-ubyte has \(20,\)"
    with pytest.raises(DataError, match=message) as error:
        read_mnist(tmp_path, expected())
    assert str(error.value).startswith(str(labels))


def test_a_missing_file_is_named(tmp_path):
    write_all(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte "):
        read_mnist(tmp_path, expected())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: no such folder"):
        read_mnist(tmp_path / "absent", expected())


def test_sizes_of_the_real_files():
    sizes = [file.header_bytes + math.prod(file.shape) for file in MNIST_FILES]
    assert sizes == [47040016, 60008, 7840016, 10008]
    assert [file.magic for file in MNIST_FILES] == [2051, 2049, 2051, 2049]
