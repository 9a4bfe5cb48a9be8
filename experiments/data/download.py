"""Fetching files into a cache folder, by pooch.

Pooch looks into the cache, checks, and gives a file its name when it is complete. Two things are
done here, as pooch does neither: going on to the next mirror, and giving one up that trickles.
"""

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from experiments.output.errors import DataError

_CHUNK_BYTES = 1 << 16


def download(
    name: str,
    sha256: str,
    folder: Path,
    mirrors: Sequence[str],
    *,
    timeout: float = 5.0,
    deadline: float = 120.0,
) -> None:
    """Fetches a file from the first mirror that delivers it intact, unless it is there already.

    The file appears in `folder` whole and checked, or not at all.

    Args:
      name: file name, the same on every mirror.
      sha256: hex digest of the file.
      folder: where it goes; created where missing.
      mirrors: base URLs, tried in this order.
      timeout: seconds that a mirror may stay silent.
      deadline: seconds that one mirror may take in all, however steadily it trickles.

    Raises:
      DataError: no mirror delivered; the message says why for each of them.
    """
    # Imported here because a run on files in a named folder need not wait for it.
    import pooch

    # The command says what it trains on; a warning stays to be seen.
    pooch.get_logger().setLevel("WARNING")

    def fetch(url: str, target: str, _: object) -> None:
        stop_at = time.monotonic() + deadline
        with urllib.request.urlopen(url, timeout=timeout) as response, open(target, "wb") as file:
            # `read1` returns with what has come; `read` would wait until a chunk is full.
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                if time.monotonic() > stop_at:
                    raise TimeoutError(f"too slow, not complete after {deadline:g} s")

    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            pooch.retrieve(url, f"sha256:{sha256}", name, folder, downloader=fetch)
            return
        except urllib.error.HTTPError as error:
            failures.append(f"{url}: HTTP status {error.code}")
            error.close()
        except urllib.error.URLError as error:
            failures.append(f"{url}: {error.reason}")
        except ValueError as error:
            failures.append(f"{url}: {'wrong checksum' if 'hash' in str(error) else error}")
        except (OSError, HTTPException) as error:
            failures.append(f"{url}: {error or type(error).__name__}")
    raise DataError(f"{name} could not be downloaded ({'; '.join(failures)})")
