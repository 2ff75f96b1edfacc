"""The documentation as a site: the pages, and a reference made of the docstrings. ``make docs`` builds it.

The source folder is the root of the repository, so that the pages link to each other, and to the files that they speak
of, by the paths that they have there. Nothing is fetched: the theme uses the fonts of the system.
"""

from embtables import __version__

project = "embtables"
author = "the authors of embtables"
copyright = "Apache-2.0"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**.md", "docs/**.rst"]
# Folders that no page lies in need not be walked through: an environment has a hundred thousand files.
exclude_patterns = [".*", "build", "dist", "runs", "tests", "embtables", "benchmarks"]
html_theme = "furo"
html_title = f"embtables {release}"

# Sections can be linked to by their headings, as GitHub does.
myst_heading_anchors = 4

# A section "Attributes:" is a list in the text: the attributes themselves are members already.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
# Annotations and defaults as the source spells them.
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
default_role = "code"
