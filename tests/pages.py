"""Code in Markdown pages: each block runs by itself and prints what its comments say."""

import ast
import contextlib
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Frameworks that an example needs and the suite does without.
OPTIONAL = {"equinox", "haiku"}


def blocks(path):
    """The page's blocks of Python, as parameters of a test with the line of each as its id."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    name = path.relative_to(ROOT).as_posix()
    return [
        pytest.param(match[1], id=f"{name}:{text[: match.start()].count(chr(10)) + 1}")
        for match in found
    ]


def run(code, name):
    """A line `print(...)  # text` prints that text."""
    for module in sorted(OPTIONAL & imports(code)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), np.printoptions():
        exec(compile(code, name, "exec"), {"__name__": "example"})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    found = printed.getvalue().splitlines()
    assert found == expected, f"{name} prints {found}, and says {expected}"


def imports(code):
    """Names of the packages that it imports."""
    nodes = list(ast.walk(ast.parse(code)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in plain}
