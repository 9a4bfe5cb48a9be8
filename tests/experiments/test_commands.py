import ast
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as listing

FOLDER = Path(listing.__file__).parent


def test_all_that_can_be_run_is_listed_and_nothing_else_lies_at_the_top():
    modules = {path.stem: path.read_text("utf-8") for path in FOLDER.glob("*.py")}
    started = {name for name, text in modules.items() if 'if __name__ == "__main__"' in text}
    assert started == {"__main__", *listing.COMMANDS}
    assert modules.keys() - started == {"__init__"}


def imported(path):
    """The modules of `experiments` that a file names in an import."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "experiments":
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("folder", [path.parent.name for path in FOLDER.glob("*/__init__.py")])
def test_folders_import_no_command_and_only_studies_the_training(folder):
    commands = {f"experiments.{name}" for name in listing.COMMANDS}
    for path in (FOLDER / folder).glob("*.py"):
        names = set(imported(path))
        assert not names & commands, path
        if folder not in ("training", "studies"):
            assert not any(name.startswith("experiments.training") for name in names), path


def test_the_list():
    command = [sys.executable, "-m", "experiments"]
    shown = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    for name in listing.COMMANDS:
        assert f"  {name} " in shown.stdout
        assert len(listing.purpose(name)) > 10


def test_a_missing_dot_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "mnist"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "python -m experiments.mnist" in done.stderr
