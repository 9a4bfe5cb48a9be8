"""Settings of Sphinx: Markdown pages, the reference from docstrings, nothing from the network."""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform

import ce_jax

NAMES = {
    name for name, value in vars(ce_jax).items() if not name.startswith("_") and callable(value)
}

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
    "navbar_persistent": [],
}
html_copy_source = False
html_show_sourcelink = False
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


class LinkNames(SphinxTransform):
    """In a page, a public name in code type is a link to its entry in the reference."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Wraps each such name; what is a link already stays as it is."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            if name not in NAMES or isinstance(literal.parent, nodes.reference | pending_xref):
                continue
            link = pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=f"ce_jax.{name}",
                refdoc=self.env.docname,
                refexplicit=True,
            )
            literal.replace_self(link)


def signature_as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Annotations as they stand in the code: evaluated, `ArrayLike` would be a line of types."""
    if what not in ("function", "class"):
        return None
    written = inspect.signature(obj)
    parameters = [
        parameter.replace(annotation=_Verbatim(parameter.annotation))
        for parameter in written.parameters.values()
    ]
    arguments = str(inspect.Signature(parameters))
    return arguments, "" if what == "class" else str(_Verbatim(written.return_annotation))


def without_overloads(analyze: Any) -> Any:
    """Autodoc would list every overload, with evaluated types, in place of the one signature."""

    def analyze_and_forget(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads.clear()

    return analyze_and_forget


class _Verbatim:
    """An annotation that prints as its text, which `str` of a signature would put into quotes."""

    def __init__(self, annotation: Any) -> None:
        self.text = getattr(annotation, "__forward_arg__", annotation)

    def __repr__(self) -> str:
        return str(self.text)


def setup(app: Any) -> None:
    """Titles before napoleon, which turns the headings of a docstring into others."""
    app.add_transform(LinkNames)
    ModuleAnalyzer.analyze = without_overloads(ModuleAnalyzer.analyze)
    app.connect("autodoc-process-docstring", titles_in_italics, priority=400)
    app.connect("autodoc-process-signature", signature_as_written)
