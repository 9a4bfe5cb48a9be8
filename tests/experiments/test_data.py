import hashlib
import logging
import logging.handlers
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest

from experiments.data import datasets
from experiments.data.download import download
from experiments.output.errors import DataError
from tests.experiments.idx_files import arrays, expected, packed, write_all

# Nothing listens on the discard port of this machine: a refusal comes at once.
DEAD_MIRROR = "http://127.0.0.1:9"


class Server:
    """A mirror on this machine: `files` maps names to contents, `requests` are the paths asked."""

    def __init__(self):
        self.files = {}
        self.requests = []
        self.pause_after = None
        self.trickles = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                content = server.files.get(self.path.rsplit("/", 1)[-1])
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    while server.trickles and content and not server.released.wait(0.02):
                        self.wfile.write(content[:1])
                        content = content[1:]
                    if server.pause_after is not None:
                        self.wfile.write(content[: server.pause_after])
                        server.released.wait(10)
                        content = content[server.pause_after :]
                    self.wfile.write(content)
                except ConnectionError:
                    pass

            def log_message(self, *_):
                pass

        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/mnist"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def mirror(server):
    for name, array in arrays().items():
        server.files[f"{name}.gz"] = packed(array)
    return server


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.delenv(datasets.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MIRRORS", (DEAD_MIRROR,))


def fetch(cache, *mirrors):
    return datasets.fetch_mnist(cache, mirrors, expected(), timeout=1.0)


def test_downloads_once_and_says_nothing(tmp_path, mirror, monkeypatch):
    log = logging.handlers.BufferingHandler(1000)
    monkeypatch.setattr(pooch.get_logger(), "handlers", [log])
    monkeypatch.setattr(pooch.get_logger(), "level", logging.DEBUG)
    for url in (mirror.url, DEAD_MIRROR):
        dataset = fetch(tmp_path / "new" / "cache", url)
        np.testing.assert_array_equal(dataset.train_images, arrays()["train-images-idx3-ubyte"])
        np.testing.assert_array_equal(dataset.test_labels, arrays()["t10k-labels-idx1-ubyte"])
    assert len(mirror.requests) == 4
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 4
    assert log.buffer == []


def test_the_second_mirror_stands_in_for_a_dead_first(tmp_path, mirror):
    assert fetch(tmp_path, DEAD_MIRROR, mirror.url).name == "mnist"


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(b"", id="empty"),
        pytest.param(packed(arrays()["train-images-idx3-ubyte"])[:-20], id="cut"),
        pytest.param(packed(np.zeros((20, 3, 4), np.uint8)), id="checksum"),
        pytest.param(bytes(10_000_000), id="too long"),
    ],
)
def test_a_damaged_download_leaves_nothing(tmp_path, mirror, damaged):
    intact = mirror.files["train-images-idx3-ubyte.gz"]
    mirror.files["train-images-idx3-ubyte.gz"] = damaged
    with pytest.raises(DataError, match=r"could not be downloaded \(\S+: wrong checksum\)$"):
        fetch(tmp_path, mirror.url)
    assert list(tmp_path.iterdir()) == []
    mirror.files["train-images-idx3-ubyte.gz"] = intact
    assert fetch(tmp_path, mirror.url).name == "mnist"


def test_an_error_says_why_for_each_mirror(tmp_path, server):
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/.*refused.*HTTP status 404"):
        fetch(tmp_path, DEAD_MIRROR, server.url)


def test_a_silent_mirror_times_out(tmp_path, mirror):
    mirror.pause_after = 30
    start = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        datasets.fetch_mnist(tmp_path, [mirror.url], expected(), timeout=0.3)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_a_trickling_mirror_is_given_up(tmp_path, mirror):
    """It is never silent for long, and would take a minute."""
    name, content = "t10k-images-idx3-ubyte.gz", bytes(3000)
    mirror.files[name], mirror.trickles = content, True
    start = time.monotonic()
    with pytest.raises(DataError, match=r"too slow, not complete after 0\.2 s"):
        download(name, hashlib.sha256(content).hexdigest(), tmp_path, [mirror.url], deadline=0.2)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_downloaded_again(tmp_path, mirror):
    fetch(tmp_path, mirror.url)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert fetch(tmp_path, mirror.url).name == "mnist"
    assert mirror.requests[4:] == ["/mnist/t10k-labels-idx1-ubyte.gz"]


def test_a_cache_that_cannot_be_written(tmp_path, mirror):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"could not be downloaded .*(exists|Not a directory)"):
        fetch(tmp_path / "file", mirror.url)


def test_auto_falls_back_to_the_digits_and_says_so():
    start = time.monotonic()
    dataset = datasets.load("auto")
    assert time.monotonic() - start < 10
    assert dataset.name == "digits"
    assert "NOT MNIST" in dataset.notice
    assert "refused" in dataset.reason


def test_mnist_never_falls_back():
    with pytest.raises(DataError, match=r"--data-dir or \$MNIST_DIR, or train on --dataset digits"):
        datasets.load("mnist")


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_a_named_folder_is_never_replaced(tmp_path, monkeypatch, name):
    write_all(tmp_path)
    with pytest.raises(DataError, match="train-images"):
        datasets.load(name, tmp_path)
    monkeypatch.setenv(datasets.DATA_DIR_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent: no such folder"):
        datasets.load(name)


def test_digits():
    dataset = datasets.load("digits")
    assert dataset.train_images.shape == (1437, 8, 8)
    assert dataset.test_images.shape == (360, 8, 8)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.train_images.max() == 16
    assert dataset.notice == ""
    assert dataset.features == 64
    assert np.bincount(dataset.test_labels).min() > 25


def test_parity():
    dataset = datasets.load("digits")
    parity = dataset.parity()
    np.testing.assert_array_equal(parity.train_labels, dataset.train_labels % 2)
    np.testing.assert_array_equal(parity.test_labels, dataset.test_labels % 2)
    assert parity.class_names == ("even", "odd")


REAL_MNIST = os.environ.get(datasets.DATA_DIR_VARIABLE)


@pytest.mark.skipif(not REAL_MNIST, reason=f"{datasets.DATA_DIR_VARIABLE} names no folder of MNIST")
def test_the_real_mnist(monkeypatch):
    monkeypatch.setenv(datasets.DATA_DIR_VARIABLE, REAL_MNIST)
    dataset = datasets.load("mnist")
    assert dataset.train_images.shape == (60000, 28, 28)
    assert dataset.test_images.shape == (10000, 28, 28)
    # The class counts of the training set, as published with it.
    assert np.bincount(dataset.train_labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert dataset.source == str(Path(REAL_MNIST))
