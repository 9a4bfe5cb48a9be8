"""Errors a person can act on: the command line prints their message alone, without a traceback."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape


class ExperimentError(Exception):
    """Base of everything the scripts report as one line."""


class DataError(ExperimentError):
    """A data set is missing, damaged or cannot be fetched."""


class RunError(ExperimentError):
    """A run folder cannot be used as asked, or a run cannot go on."""


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the program with one line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    raise typer.Exit(status)
