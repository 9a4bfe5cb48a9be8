"""Fetching files into a cache folder: mirrors, a time-out, a check, and one atomic rename."""

import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from experiments.output.errors import DataError

_CHUNK_BYTES = 1 << 16


def download(
    name: str,
    folder: Path,
    mirrors: Sequence[str],
    *,
    max_bytes: int,
    check: Callable[[Path], object],
    timeout: float = 5.0,
    deadline: float = 120.0,
) -> Path:
    """Fetches a file from the first mirror that delivers it intact.

    The file appears in `folder` whole and checked, or not at all: it is written under a temporary
    name, which is renamed at the end and removed on any failure.

    Args:
      name: file name, the same on every mirror.
      folder: where it goes; created where missing.
      mirrors: base URLs, tried in this order.
      max_bytes: a longer body is refused, and not read any further.
      check: called on the temporary file; raises DataError where it is not what it should be.
      timeout: seconds that a mirror may stay silent.
      deadline: seconds that one mirror may take in all, however steadily it trickles.

    Returns:
      The path of the file in `folder`.

    Raises:
      DataError: no mirror delivered; the message says why for each of them.
    """
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            return _fetch(url, folder / name, max_bytes, check, timeout, deadline)
        except urllib.error.HTTPError as error:
            failures.append(f"{url}: HTTP status {error.code}")
            error.close()
        except urllib.error.URLError as error:
            failures.append(f"{url}: {error.reason}")
        except (DataError, OSError, HTTPException) as error:
            failures.append(f"{url}: {error or type(error).__name__}")
    raise DataError(f"{name} could not be downloaded ({'; '.join(failures)})")


def _fetch(
    url: str,
    target: Path,
    max_bytes: int,
    check: Callable[[Path], object],
    timeout: float,
    deadline: float,
) -> Path:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays that of the target: it says how to unpack the file.
        handle, temporary_name = tempfile.mkstemp(
            prefix=".partial-", suffix=f"-{target.name}", dir=target.parent
        )
        temporary = Path(temporary_name)
        try:
            with os.fdopen(handle, "wb") as file:
                _copy(response, file, max_bytes, time.monotonic() + deadline)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _copy(source: BinaryIO, target: BinaryIO, max_bytes: int, stop_at: float) -> None:
    copied = 0
    while chunk := source.read(min(_CHUNK_BYTES, max_bytes + 1 - copied)):
        copied += len(chunk)
        if copied > max_bytes:
            raise DataError(f"it is longer than the {max_bytes} bytes allowed")
        if time.monotonic() > stop_at:
            raise DataError(f"too slow, {copied} bytes so far")
        target.write(chunk)
