"""The site of these pages: `sphinx-build -W --keep-going -b html docs docs/_build`, without network."""

from lightning_namo import __version__

project = "lightning-namo"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # as GitHub's: page.md#a-heading

default_role = "py:obj"  # `NAMO` in a docstring is a link where the reference has it
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "lightning-namo"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
