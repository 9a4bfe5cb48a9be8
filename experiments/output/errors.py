"""Errors a person can act on: the command line prints their message alone, without a traceback."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

_FULL = (errno.ENOSPC, errno.EDQUOT)


class ExperimentError(Exception):
    """Base of everything the scripts report as one line."""


class DataError(ExperimentError):
    """A data set is missing, damaged or cannot be fetched."""


class RunError(ExperimentError):
    """A run folder cannot be used as asked, or a run cannot go on."""


@contextlib.contextmanager
def reported(folder: Path, cure: str) -> Iterator[None]:
    """Ends the program with a message and an exit status where its body cannot go on.

    Args:
      folder: where the body writes. An error of the system that names no file is about it.
      cure: a sentence that says how to go on after an interrupt or a full disk.
    """
    try:
        yield
    except ExperimentError as error:
        fail(str(error))
    except OSError as error:
        advice = f". Make room on the disk. {cure}" if error.errno in _FULL else ""
        fail(f"{error.filename or folder}: {error.strerror or error}{advice}")
    except KeyboardInterrupt:
        fail(f"interrupted. {cure}", 130)


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the program with a message on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    raise typer.Exit(status)
