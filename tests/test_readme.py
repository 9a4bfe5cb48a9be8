"""The README's code runs and prints what it says; its commands, links and pictures exist."""

import re
import tomllib

import pytest

from tests import pages
from tests.pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = pages.blocks(ROOT / "README.md")


def test_it_is_short():
    assert len(README.splitlines()) <= 250


def test_there_are_blocks():
    assert len(BLOCKS) == README.count("```python") >= 2


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("code", BLOCKS)
def test_code(code, request):
    pages.run(code, request.node.callspec.id)


@pytest.mark.parametrize("kind", ["main", "test"])
def test_commands_are_one_line(kind):
    commands = re.findall(rf"<!-- command: {kind} -->\n```sh\n(.*)\n```", README)
    assert len(commands) == 1
    assert commands[0].startswith("python3 -m venv .venv && ")


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    for target in local:
        assert (ROOT / target).stat().st_size > 0


def test_where_it_is_published_nothing_points_to_a_file():
    """What the build makes of it, by the same substitutions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert [fragment["path"] for fragment in hook["fragments"]] == ["README.md"]
    text = README
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "<!-- repository" not in text
    assert "| one class id per example | `softmax_cross_entropy_with_integer_labels` |" in text
