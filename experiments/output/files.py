"""Writing into a folder of results: a new one, and each file as a whole."""

import os
from datetime import datetime
from pathlib import Path

from experiments.output.errors import RunError

_TEMPORARY_SUFFIX = ".partial"


def folder_of(out: Path | None, name: str, started: datetime) -> Path:
    """The folder for the results of a run: `out`, or one in `runs` with the time of its start."""
    return out or Path("runs") / f"{name}-{started:%Y%m%d-%H%M%S}"


def require_fresh(path: Path, *, resumable: str = "") -> None:
    """Raises RunError unless new results could go into this folder: it is missing or empty.

    Args:
      path: the folder.
      resumable: the file by which to know a run that --resume can continue.
    """
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: not a folder")
        if path.exists() and not is_fresh(path):
            found = resumable and (path / resumable).exists()
            more = ", or continue the run in it with --resume" if found else ""
            raise RunError(f"{path}: not empty; name another --out{more}")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error


def claim(path: Path) -> None:
    """Makes a folder for new results, or raises RunError where something is in it."""
    require_fresh(path)
    path.mkdir(parents=True, exist_ok=True)


def is_fresh(path: Path) -> bool:
    """Whether a folder holds nothing, or only what a kill before the first write left."""
    return all(entry.name.endswith(_TEMPORARY_SUFFIX) for entry in path.iterdir())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader sees the old text or the new."""
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        with temporary.open("w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        # On a full disk it would take the room of something else.
        temporary.unlink(missing_ok=True)
        raise
