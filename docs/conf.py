"""Sphinx: `make docs`. Pages are Markdown; figures are the README's, which come from JSON."""

import pathlib
import re

from jax_flashmla import __version__

project = "jax_flashmla"
author = "The jax_flashmla authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which types do not
default_role = "code"  # as in Markdown
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"jax_flashmla {__version__}"

README = pathlib.Path(__file__).parent.parent / "README.md"


def readme_section(heading):
    """A section of the README below its heading, links to the repository's files as plain words."""
    text = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    text = re.sub(r"; \[raw samples\]\([^)]*\)", "", text).replace("(docs/_static/", "(./_static/")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|\./)[^)]*\)", r"\1", text)


def adapt(app, docname, source):
    """Pages are also read as they are: what only a site can have is put in here."""
    del app, docname
    text = re.sub(r"^<!-- README: (.*) -->$", lambda m: readme_section(m[1]), source[0], flags=re.M)
    text = re.sub(r"; \[raw samples\]\(\.\./[^)]*\)", "", text)
    source[0] = text.replace("(../README.md#", "(performance.md#")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", adapt)
