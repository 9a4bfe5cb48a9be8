"""The README's code runs and prints what it says; its commands, options and pictures exist."""

import ast
import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

import ce_jax

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    pytest.param(match[1], id=f"line{README[: match.start()].count(chr(10)) + 1}")
    for match in re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
]
PUBLIC = [f for f in vars(ce_jax).values() if inspect.isfunction(f) and f.__name__[0] != "_"]


def test_there_are_blocks():
    assert len(BLOCKS) == README.count("```python") >= 7


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("code", BLOCKS)
def test_code(code):
    """A line `print(...)  # text` prints that text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


@pytest.mark.parametrize("kind", ["main", "test"])
def test_commands_are_one_line(kind):
    commands = re.findall(rf"<!-- command: {kind} -->\n```sh\n(.*)\n```", README)
    assert len(commands) == 1
    assert commands[0].startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_functions_and_options_are_documented(function):
    """An option has a row of its own, or stands with its default in the function's row."""
    rows = [row for row in README.splitlines() if row.startswith("|")]
    own = "".join(row for row in rows if f"`{function.__name__}`" in row)
    assert own
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            continue
        if not any(row.startswith(f"| `{parameter.name}` |") for row in rows):
            stated = re.search(rf"`{parameter.name}=(.+?)`", own)
            assert stated, parameter
            assert ast.literal_eval(stated[1]) == parameter.default


def test_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 0
