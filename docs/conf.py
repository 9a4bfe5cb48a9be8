"""Settings of Sphinx: Markdown pages, the reference from docstrings, nothing from the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ce_jax

ROOT = Path(__file__).resolve().parent.parent

project = "ce_jax"
author = "The ce_jax authors"
copyright = f"2026, {author}"
version = release = ce_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    # Brings MathJax as files, so that formulas need no network, neither now nor when they are read.
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.strikethrough"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# Notebooks are stored with their outputs, which a test of the suite reproduces.
nb_execution_mode = "off"
nb_merge_streams = True

# In a docstring `name` is a link where there is such a name, and code where there is none.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# The signature has the types; as text their asterisks would be taken for emphasis.
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80

templates_path: list[str] = []
html_theme = "sphinx_book_theme"
html_title = "ce_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": False,
}
html_copy_source = False
html_show_sourcelink = False
# The theme's own file of icons is used; none is fetched.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def titles_in_italics(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Below "References:" a text in backquotes is the title of a publication, not a name."""
    if "References:" in lines:
        start = lines.index("References:")
        text = re.sub(r"`([^`]+)`", r"*\1*", "\n".join(lines[start:]))
        lines[start:] = text.split("\n")


def setup(app: Any) -> None:
    """Runs before napoleon, which turns the headings of a docstring into others."""
    app.connect("autodoc-process-docstring", titles_in_italics, priority=400)
