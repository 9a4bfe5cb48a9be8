"""The pages' code runs and prints what it says; every public name is in the reference, once."""

import contextlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import ce_jax
from tests import pages
from tests.pages import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMES = sorted(
    name for name, value in vars(ce_jax).items() if not name.startswith("_") and callable(value)
)
BLOCKS = [block for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for block in pages.blocks(page)]
REFERENCE = [
    (page.stem, name)
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^\.\. auto\w+:: (\w+)$", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("code", BLOCKS)
def test_code(code, request):
    pages.run(code, request.node.callspec.id)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_one_entry(name):
    assert [entry for _, entry in REFERENCE].count(name) == 1


def test_every_entry_is_a_public_name():
    assert {entry for _, entry in REFERENCE} <= {*NAMES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_python_is_left_out(page):
    """Every fence says what it holds, so that no code can hide from `test_code`."""
    fences = re.findall(r"^```(\S*)\n", page.read_text("utf-8") + "\n", re.MULTILINE)
    opening = [fence for fence in fences if fence]
    assert {fence for fence in opening if not fence.startswith("{")} <= {"python", "py", "sh"}
    # `train.py` is run by two processes, in a test of the experiments.
    assert opening.count("py") == (page.name == "many_devices.md")


def test_every_page_is_in_the_contents():
    contents = (DOCS / "index.md").read_text("utf-8") + (DOCS / "api/index.md").read_text("utf-8")
    listed = {line.rpartition("/")[2] for line in contents.splitlines()}
    found = {path.stem for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert found - listed <= {"index"}


def test_long_tables_come_from_files():
    """Figures of the results folders are included, never typed."""
    for page, folder in (("benchmarks", "benchmark"), ("numerics", "numerics")):
        text = (DOCS / f"{page}.md").read_text("utf-8")
        included = re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE)
        assert any(f"/results/{folder}" in path for path in included)
        for path in included:
            assert (DOCS / path).stat().st_size > 0


def test_the_version_stands_in_one_place():
    """And what has to repeat it agrees."""
    assert f"\nversion: {ce_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {ce_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert 'dynamic = ["readme", "version"]' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.fixture
def print_options():
    """Those of NumPy, which a notebook sets, are those of before again afterwards."""
    with np.printoptions():
        yield


NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.usefixtures("lenient", "print_options")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(path, monkeypatch):
    """Run anew, cell by cell; the pictures are drawn, and those that are stored exist."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pyplot.switch_backend("agg")
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    variables = {"__name__": "notebook"}
    cells = json.loads(path.read_text("utf-8"))["cells"]
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        shown.clear()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{path.name}:{number}", "exec"), variables)
        streams = ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
        assert printed.getvalue() == "".join(streams), cell["source"]
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(pictures) == len(shown), cell["source"]
        pyplot.close("all")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nothing_of_the_network(tmp_path):
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = [page.read_text("utf-8") for page in tmp_path.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        # Scripts and sheets of styles, not the links that a reader may follow.
        assert not re.search(r'<script[^>]* src="(?:https?:)?//', page)
        assert not re.search(r'<link[^>]* rel="stylesheet"[^>]* href="(?:https?:)?//', page)
