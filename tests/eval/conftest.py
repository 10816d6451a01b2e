import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).with_name("fake_run.py")


@pytest.fixture(scope="session")
def fake():
    """A generator of run directories that were never generated, as a module."""
    spec = importlib.util.spec_from_file_location("dit_accel_fake_run", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
