"""The documentation as a site: it builds without a warning, and its reference holds every public name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from api import PACKAGES, names_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(
            package, reason=f"{package} is not installed; pip install '.[docs]', with Python 3.11 or later"
        )
    pytest.importorskip("torchrec.sparse.tensor_dict", reason="torchrec is not installed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-c", "docs", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(folder / "html")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, "\n" + result.stdout + result.stderr
    return folder / "html"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_holds_every_public_name(site: Path, package: str) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "docs" / "api").glob("*.html"))
    exports = {name: vars(importlib.import_module(name)) for name in PACKAGES}
    missing = []
    for name in names_of(importlib.import_module(package)):
        value = getattr(importlib.import_module(package), name)
        # What several packages export is described once, where one of them has it or where it is defined.
        places = [place for place, names in exports.items() if names.get(name) is value]
        places += [package, getattr(value, "__module__", package)]
        if callable(value) and not any(f'id="{place}.{name}"' in reference for place in places):
            missing.append(name)
    assert not missing, f"docs/api lacks {', '.join(missing)} of {package}"


def test_every_page_is_part_of_the_site(site: Path) -> None:
    pages = [*ROOT.glob("docs/**/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    assert [page for page in pages if not (site / page.relative_to(ROOT)).with_suffix(".html").is_file()] == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and images are files of the site: it can be read without a network."""
    loaded = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    found = {match[0] for page in site.glob("**/*.html") for match in loaded.finditer(page.read_text(encoding="utf-8"))}
    assert found == set()
