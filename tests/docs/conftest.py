import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def oracle():
    """The equations in fp64, as a module."""
    path = Path(__file__).parents[1] / "algebra" / "oracle.py"
    spec = importlib.util.spec_from_file_location("dit_accel_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
