import importlib.util
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def _module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake():
    """A generator of run directories that were never generated, as a module."""
    return _module("dit_accel_fake_run", _HERE / "fake_run.py")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Directory of a stock Wan pipeline with small random weights: 3 layers of 2 heads of 24."""
    made = _module("dit_accel_pipelines_conftest", _HERE.parent / "pipelines" / "conftest.py")
    directory = tmp_path_factory.mktemp("models") / "small"
    made.random_pipe().save_pretrained(directory)
    return str(directory)
