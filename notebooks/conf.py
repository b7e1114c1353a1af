"""Builds the documentation: ``python -m sphinx -W notebooks .docs/html``."""

import ast
import importlib.metadata
import inspect
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import download_reference, pending_xref
from sphinx.util.logging import getLogger

import adamax_jax

logger = getLogger(__name__)

project = "adamax_jax"
author = copyright = "The adamax_jax authors"
release = importlib.metadata.version("adamax_jax")
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# The notebooks are committed as executed.
nb_execution_mode = "off"
# Renders tables of Markdown outputs, which by default stay text.
nb_render_markdown_format = "myst"
autosummary_generate = False
napoleon_use_ivar = True
# The docstrings of the states say what m and u are; their types are long unions.
napoleon_attr_annotations = False
napoleon_use_rtype = False
# Blocks without a language: commands, tables, formulas.
highlight_language = "text"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
# The files hold the names that are used here, for builds without a network.
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest/", (None, "jax.inv")),
    "optax": ("https://optax.readthedocs.io/en/latest/", (None, "optax.inv")),
}
intersphinx_timeout = 5
html_theme = "furo"
# Furo's own underlines modules, as if they were links.
pygments_dark_style = "monokai"
html_title = "adamax_jax"
html_static_path = ["custom.css"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"


def write_signature(app, what, name, obj, options, signature, returns):
    """Writes types by name: ArrayLike, not the eight types that it stands for."""
    if what == "class":
        return f"({', '.join(obj._fields)})" if hasattr(obj, "_fields") else "", None
    if what != "function":
        return None
    (function,) = ast.parse(inspect.getsource(obj)).body
    signature = f"({ast.unparse(function.args)})"
    signature = re.sub(r"\b(Array|DType)Like", r"jax.typing.\1Like", signature)
    return signature, ast.unparse(function.returns)


def link_names(app, doctree):
    """Links names of this package, JAX and Optax to their documentation."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        if name in adamax_jax.__all__:
            name = f"adamax_jax.{name}"
        is_name = name.startswith(("adamax_jax.", "jax.", "optax."))
        in_text = isinstance(literal.parent, nodes.paragraph | nodes.inline)
        if is_name and in_text and not is_label(literal):
            link = pending_xref(reftarget=name, refdomain="py", reftype="obj")
            literal.replace_self(link)
            link += literal
    # In annotations all names are taken for classes, also jax.typing.ArrayLike.
    for link in doctree.findall(pending_xref):
        if link["reftarget"].startswith(("jax.", "optax.")):
            link["reftype"] = "obj"


def is_label(node):
    """Whether a node is in the head or first column of a table: other libraries'."""
    while node is not None and not isinstance(node, nodes.entry):
        node = node.parent
    if node is None:
        return False
    return isinstance(node.parent.parent, nodes.thead) or node.parent[0] is node


def keep_numbers_together(app, doctree, name):
    """No line breaks within numbers in tables: 0.1 ± 0.2, 3 %, 17.6 ms."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            kept = re.sub(
                r" (?=[±%])|(?<=±) |(?<=\d) (?=(?:ms|s|MB|GB)\b)", "\xa0", text
            )
            text.parent.replace(text, nodes.Text(kept))


def name_figures(app, doctree, name):
    """What a figure shows, for those who do not see it: the heading above it."""
    for image in doctree.findall(nodes.image):
        section = image.parent
        while not isinstance(section, nodes.section | nodes.document):
            section = section.parent
        title = section.next_node(nodes.title)
        image["alt"] = f"A figure: {title.astext() if title else name}"


def unlink_files(app, doctree):
    """Links to files of the repository are for GitHub: here they would download."""
    for link in list(doctree.findall(download_reference)):
        link.replace_self(link.children)


def warn_of_raw_tables(app, doctree):
    for paragraph in doctree.findall(nodes.paragraph):
        if paragraph.astext().startswith("| "):
            logger.warning("A table is not rendered.", location=paragraph)


def mathml(formula, display):
    """MathML, which browsers render without a script."""
    formula = formula.replace("{aligned}", "{split}")
    # As in Sphinx's own renderers, an empty line separates equations.
    formula = r"\\".join(re.split(r"\n\s*\n", formula.strip()))
    if r"\\" in formula and r"\begin" not in formula:
        formula = rf"\begin{{split}}{formula}\end{{split}}"
    result = convert(formula, display=display)
    # Spaces around functions, and none around bars.
    result = re.sub(
        "<m[io][^>]*>(exp|ln|log|max|min)</m[io]>",
        r'<mo lspace=".17em" rspace=".1em">\1</mo>',
        result,
    )
    bar = 'stretchy="false">&#x0007C;'
    return result.replace(bar, f'lspace="0" rspace="0" {bar}')


def visit_math(translator, node):
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    formula = mathml(node.astext(), "block")
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-signature", write_signature)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", warn_of_raw_tables)
    app.connect("doctree-resolved", keep_numbers_together)
    app.connect("doctree-resolved", name_figures)
    # Before Sphinx collects the files.
    app.connect("doctree-read", unlink_files, priority=100)
