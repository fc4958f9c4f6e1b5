"""Settings of the documentation: `make docs` builds it, and a warning is an error."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(HERE.parent)  # of commands that a tutorial runs
warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")

import from_code
import links
import notebooks

from metatele._version import __version__

project = "metatele"
author = "The metatele developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials/*.ipynb", "tutorials/*.py", "**/sg_execution_times.rst", "*_times.rst"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath"]
copybutton_prompt_text = ">>> "

# Every name once, as its own docstring tells it.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

sphinx_gallery_conf = {
    "examples_dirs": [str(HERE.parent / "examples")],
    "gallery_dirs": ["tutorials"],
    "filename_pattern": r"/[0-9]_",  # the tutorials, in their order
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 600,  # they say which machine was busy
    "image_scrapers": ("matplotlib",),
    "reset_modules": (),
}

html_theme = "furo"
html_title = "metatele"
html_static_path = ["_static"]
html_css_files = ["metatele.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f4e79", "color-brand-content": "#1f4e79"},
    "dark_css_variables": {"color-brand-primary": "#8ab4e8", "color-brand-content": "#8ab4e8"},
}


def setup(app: object) -> None:
    """Write what is made from the code, and let links that leave the pages lead to files."""
    # After the gallery, whose own notebooks keep the markup of pages
    app.connect("builder-inited", lambda app: notebooks.write(HERE / "tutorials"), priority=900)  # type: ignore[attr-defined]
    app.connect("builder-inited", lambda app: from_code.write(HERE / "reference"))  # type: ignore[attr-defined]
    app.connect("source-read", links.rewritten)  # type: ignore[attr-defined]
