"""The order of the house: which room may know which, and how large a file may grow."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# room -> rooms of ours that it may import; the command line is the roof
MAY = {
    "kernels": {"kernels"},
    "core": {"kernels", "core"},
    "pipelines": {"core", "pipelines"},
    "eval": {"core", "kernels", "pipelines", "eval"},
    "cli": {"core", "kernels", "pipelines", "eval", "cli"},
}


FILES = [
    path
    for top in ("dit_accel", "kernels", "pipelines", "eval")
    for path in (ROOT / top).rglob("*.py")
]


def room_of(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] != "dit_accel":
        return parts[0]
    return "cli" if parts[1] in ("cli", "__main__.py") else "core"


def imported(path):
    """Modules of ours that a file imports; what is for type checkers only does not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "dit_accel":
            continue
        room = parts[1] if len(parts) > 1 and parts[1] in MAY else "core"
        assert room in MAY[room_of(path)], f"{room_of(path)} imports {name}"


def test_one_implementation_does_not_import_another():
    for path in (ROOT / "kernels").rglob("*.py"):
        if path.name in ("reference.py", "batched.py", "triton.py", "hopper.py"):
            for name in imported(path):
                assert not set(name.split(".")) & {"reference", "batched"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 600 if path.name in ("triton.py", "hopper.py") else 400
    assert len(path.read_text().splitlines()) <= limit


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned():
    known = {plain(name) for name in pins()}
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["dev"]]:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
        assert plain(name) in known, requirement


def test_the_readme_installs_with_the_pins():
    text = (ROOT / "README.md").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) >= 2
    assert all("-c constraints.txt" in line for line in installs), installs


def test_every_name_of_the_readme_exists():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/architecture.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target
