"""What the documentation says is what the code does, and every link leads somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from dit_accel import presets

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def options():
    """The script that writes the pages' tables."""
    spec = importlib.util.spec_from_file_location("dit_accel_docs_options", DOCS / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_of_a_paper_has_a_page():
    of_papers = {row.name for row in presets.catalogue() if row.paper is not None}
    assert {page.stem for page in METHODS} == {"README", *of_papers}


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_tables_are_those_of_the_code(options, page):
    text = page.read_text()
    wanted = {"combinations"} if page.stem == "README" else {"options", "deviations"}
    assert set(re.findall(r"<!-- (\w+) -->", text)) == wanted | {"end"}
    assert options.filled(text, options.preset_of(page)) == text, "run python docs/options.py"


@pytest.mark.parametrize("row", presets.catalogue(), ids=lambda row: row.name)
def test_options_defaults_and_deviations_are_on_the_page(row):
    """Without the script: it could leave something out."""
    if row.paper is None:
        return
    text = (DOCS / "methods" / f"{row.name}.md").read_text()
    assert f"arxiv.org/abs/{row.paper.arxiv}" in text
    for option in row.options.values():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{option.name}` |"))
        assert option.help in line
        default = str(option.default).lower() if option.default not in (None, ()) else "none"
        assert line.split("|")[2].strip() == f"`{default}`"
    for deviation in row.deviations:
        assert deviation in text


def test_what_is_written_anew_differs_from_what_is_old(options):
    page = "<!-- options -->\nwas here before\n<!-- end -->\nstays"
    new = options.filled(page, presets.get("vmoba"))
    assert "was here before" not in new
    assert "| `threshold` |" in new
    assert new.endswith("<!-- end -->\nstays")
    with pytest.raises(KeyError):
        options.filled("<!-- nothing -->\n<!-- end -->", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs, target


def code_blocks():
    for page in METHODS:
        for number, code in enumerate(
            re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        ):
            yield pytest.param(code, id=f"{page.stem}-{number}")


@pytest.mark.parametrize("code", list(code_blocks()))
def test_python_on_the_pages_runs(code):
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


def test_formulas_are_as_github_reads_them():
    """Odd dollar signs swallow the rest of a page; backslashed punctuation is Markdown's."""
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        assert "$$" not in text, "display formulas are fenced: ```math"
        assert text.count("$") % 2 == 0, page
        for formula in re.findall(r"\$([^$]*)\$", text):
            assert not re.search(r"\\[^A-Za-z]", formula), formula
