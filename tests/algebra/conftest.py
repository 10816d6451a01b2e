import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).with_name("oracle.py")


@pytest.fixture(scope="session")
def oracle():
    """The equations in fp64, as a module."""
    spec = importlib.util.spec_from_file_location("dit_accel_oracle", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
