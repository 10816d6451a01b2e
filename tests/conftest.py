import os

# before anything imports triton or asks a model hub
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(scope="session")
def saved_family(tmp_path_factory):
    """The directory of a specimen's pipeline: ``saved_family(specimen)``."""
    import specimens

    known = {}

    def save(specimen):
        if specimen.make not in known:
            known[specimen.make] = tmp_path_factory.mktemp(specimen.name)
            specimens.built(specimen.make).save_pretrained(known[specimen.make])
        return known[specimen.make]

    return save


@pytest.fixture(scope="session")
def _families():
    return {}


@pytest.fixture
def loaded_family(saved_family, _families):
    """A specimen's pipeline, loaded by `load` once, and stock again after every test."""
    import dit_accel

    given = []

    def get(specimen):
        if specimen.make not in _families:
            pipe = _families[specimen.make] = dit_accel.pipelines.load(saved_family(specimen))
            pipe.set_progress_bar_config(disable=True)
            for name, value in specimen.short.items():
                setattr(pipe, name, value)
        given.append(_families[specimen.make])
        return given[-1]

    yield get
    for pipe in given:
        dit_accel.restore(pipe)
