"""Sphinx's settings for this site: ``nox -s docs``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "sequence-mixers"
copyright = "the sequence-mixers maintainers, Apache-2.0"
release = version = metadata.version("sequence-mixers")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "pages"]
exclude_patterns = ["built", "made/**.part.md"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"sequence-mixers {release}"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["site.css"]
html_math_renderer = "mathml"
