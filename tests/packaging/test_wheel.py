"""What is installed, and under which names."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "pipelines", "eval")


ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]"
"""Takes an editable install of this clone, if there is one, off the path."""


def python(code, *, cwd, env=None, script=None):
    """Run code in a new interpreter: from a file, as a console script is, or with ``-c``."""
    where = ["-c", code]
    if script is not None:
        script.write_text(code)
        where = [str(script)]
    done = subprocess.run(
        [sys.executable, *where],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git would carry, so that no build folder is left in the clone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "dit_accel", *FOLDERS):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(out), str(source)],
        check=True,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel installed in it, to go first on the path."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--target", str(target), str(wheel)],
        check=True,
    )  # fmt: skip
    return target


def sources():
    """Every module of the clone, by the name it must have in a wheel."""
    found = {
        f"dit_accel/{p.relative_to(ROOT / 'dit_accel')}" for p in (ROOT / "dit_accel").rglob("*.py")
    }
    for folder in FOLDERS:
        found |= {f"dit_accel/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    return found


def test_the_wheel_holds_everything_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dit_accel", next(t for t in tops if t.endswith(".dist-info"))}
    assert {name for name in names if name.endswith(".py")} == sources()
    assert "dit_accel/py.typed" in names
    for name in ("report.html.j2", "style.css", "script.js"):
        assert f"dit_accel/eval/report/templates/{name}" in names
    for path in (ROOT / "kernels/tuning").glob("*.json"):
        assert f"dit_accel/kernels/tuning/{path.name}" in names
    weights = "dit_accel/pipelines/tiny_wan/weights/"
    wanted = {
        weights + str(path.relative_to(ROOT / "pipelines/tiny_wan/weights"))
        for path in (ROOT / "pipelines/tiny_wan/weights").rglob("*")
        if path.is_file()
    }
    assert {name for name in names if name.startswith(weights)} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


WHERE = f"""{ALONE}
import dit_accel.kernels, dit_accel.pipelines, dit_accel.eval
print(dit_accel.__file__)"""


def test_a_plain_install_works_anywhere(site, tmp_path):
    env = {"PYTHONPATH": str(site)}
    found = python(WHERE, cwd=tmp_path, env=env)
    assert found.startswith(str(site))
    # inside the clone: a script sees the install, ``-c`` the clone; neither is broken
    assert python(WHERE, cwd=ROOT, env=env, script=tmp_path / "s.py").startswith(str(site))
    assert python(WHERE, cwd=ROOT, env=env).startswith(str(ROOT))


def test_the_console_script_works_inside_the_clone(site):
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "dit-accel"), "models"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny-wan" in done.stdout


SPECS = (
    "import importlib.util as u, dit_accel;"
    "print([s.origin for n in ('kernels', 'pipelines', 'eval') if (s := u.find_spec(n))])"
)


def test_a_script_finds_no_kernels_of_ours(site, tmp_path):
    """As a console script is run: its own folder is on the path, and not the clone."""
    for env in ({"PYTHONPATH": str(site)}, {}):
        found = python(SPECS, cwd=ROOT, env=env, script=tmp_path / "s.py")
        assert str(ROOT) not in found
        assert str(site) not in found


def test_pytest_finds_no_kernels_of_ours():
    """diffusers imports a package of this name from PyPI."""
    if {"", str(ROOT)} & set(sys.path):
        pytest.skip("python -m pytest puts the clone on the path; plain pytest does not")
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_importing_needs_neither_diffusers_nor_triton(tmp_path):
    """Nor does attention on tensors."""
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('diffusers', 'transformers', 'triton', 'torchmetrics', 'imageio'):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch, dit_accel
q = torch.randn(1, 1, 64, 8)
print(dit_accel.attention(q, q, q, 'pisa', grid=(4, 4, 4)).shape[2])
"""
    assert python(code, cwd=tmp_path, script=tmp_path / "s.py") == "64"
