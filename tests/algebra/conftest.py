import importlib.util
from pathlib import Path

import pytest


def _module(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"dit_accel_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle():
    """The equations in fp64, as a module."""
    return _module("oracle")


@pytest.fixture(scope="session")
def fields():
    """Smooth random fields under rotary embedding, as a module."""
    return _module("fields")
