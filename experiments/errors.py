"""Errors a person can act on: the command line prints their message alone, without a traceback."""


class ExperimentError(Exception):
    """Base of everything the scripts report as one line."""


class DataError(ExperimentError):
    """A data set is missing, damaged or cannot be fetched."""


class RunError(ExperimentError):
    """A run folder cannot be used as asked, or a run cannot go on."""
