"""Builds the documentation: ``python -m sphinx -W notebooks .docs/html``."""

import importlib.metadata

project = "adamax_jax"
author = copyright = "The adamax_jax authors"
release = importlib.metadata.version("adamax_jax")
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_nb",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# The notebooks are committed as executed.
nb_execution_mode = "off"
autodoc_typehints = "none"
napoleon_use_rtype = False
html_theme = "furo"
html_title = "adamax_jax"
