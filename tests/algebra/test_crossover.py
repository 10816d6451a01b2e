"""Dense attention in place of a method, by figures that are made up here."""

import json

import pytest
import torch

from dit_accel import Context, Geometry, InputError, crossover, presets
from dit_accel.crossover import Crossover, choose, find, options_of
from dit_accel.types import Prefix

PISA = presets.pisa(density=0.15)


def row(method=PISA, tokens=8192, **changes):
    settings = {
        **{"method": method.name, "options": options_of(method), "share": 0.2, "layer": None},
        **{"heads": 24, "head_dim": 128, "against": "sdpa", "tokens": tokens, "longest": 32768},
    }
    return Crossover(**{**settings, **changes})


@pytest.fixture
def figures(monkeypatch):
    """Makes the CPU an architecture of these figures."""

    def use(*rows):
        monkeypatch.setattr(crossover, "architecture_of", lambda device: "9.0")
        monkeypatch.setattr(crossover, "measured", lambda name: rows if name == "9.0" else ())

    return use


def chosen(method=PISA, tokens=4096, heads=24, head_dim=128, dtype=torch.bfloat16, **where):
    like = torch.empty(1, dtype=dtype)
    ctx = Context(Geometry((1, 1, tokens)), num_steps=10, **where)
    return choose(method, ctx, like, heads, head_dim)


def test_dense_below_the_length_measured(figures):
    figures(row())
    assert "from 8,192 tokens on; dense_below=0" in chosen().reason
    assert "sm_90 with 24 heads of 128, density 0.2" in chosen().reason
    assert chosen(tokens=8191) is not None
    assert chosen(tokens=8192) is None


def test_never_faster_is_dense_as_far_as_was_measured(figures):
    figures(row(tokens=None))
    assert "slower than dense attention at up to 32,768" in chosen(tokens=32768).reason
    assert chosen(tokens=32769) is None


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (presets.pisa(density=0.15, block_q=64), {}),
        (presets.pisa(density=0.15, rest="moment"), {}),
        (presets.pisa(density=0.3), {}),
        (presets.pisa(density=0.15, dense_below=0), {}),
        (presets.pisa(density=0.15, dense_below=100), {}),
        (presets.custom(), {}),
        (presets.dense(), {}),
        (PISA, {"heads": 23}),
        (PISA, {"head_dim": 64}),
        (PISA, {"dtype": torch.float32}),
        (PISA, {"prefix": Prefix(3, lambda: None)}),
    ],
)
def test_no_figure_no_choice(figures, method, changes):
    figures(row())
    assert chosen(method, **changes) is None
    assert chosen(presets.pisa(density=0.1, dense_steps=2), heads=48) is not None


def test_no_choice_without_a_measured_gpu():
    assert crossover.architecture_of(torch.device("cpu")) is None
    assert chosen() is None


def test_the_next_larger_share_and_the_next_smaller_heads():
    rows = [row(share=s, heads=h, tokens=1000 * h) for s in (0.1, 0.2, 0.4) for h in (12, 24, 40)]
    asked = {"layer": None, "head_dim": 128, "against": "sdpa"}
    for share, heads, wanted in (
        (0.1, 12, (0.1, 12)),
        (0.11, 39, (0.2, 24)),
        (0.4, 400, (0.4, 40)),
        (0.41, 40, None),
        (0.1, 11, None),
        (None, 40, None),
    ):
        found = find(rows, PISA, share=share, heads=heads, **asked)
        assert (found and (found.share, found.heads)) == wanted


def test_shares_that_go_by_step_and_layers_that_take_turns(figures):
    by_step = presets.pisa(density={0: 0.9, 0.5: 0.2})
    figures(row())
    assert chosen(by_step, step=0) is None
    assert chosen(by_step, step=5) is not None
    vmoba = presets.vmoba()
    figures(row(vmoba, share=0.25, layer=2))
    assert [chosen(vmoba, layer=layer) is not None for layer in range(6)] == [
        False,
        False,
        True,
    ] * 2


def test_a_number_of_tokens_counts_anywhere():
    method = presets.pisa(dense_below=65)
    where = [Context(Geometry((1, 8, 8))), Context(Geometry((1, 5, 13)))]
    assert [method.wants_all(ctx) for ctx in where] == [True, False]
    assert type(method).from_config(method.to_config()) == method
    kept = presets.flashblock(inner=presets.pisa(dense_below=7))
    assert kept.schedule.dense_below == 7
    assert presets.flashblock(inner="pisa", dense_below=9).schedule.dense_below == 9
    for bad in (-1, 2.5, "never", True):
        with pytest.raises(InputError, match="dense_below: expected"):
            presets.pisa(dense_below=bad)


def test_the_figures_that_come_with_the_package_can_be_read():
    from importlib.resources import files

    text = files("dit_accel").joinpath("crossovers.json").read_text()
    for architecture in json.loads(text):
        rows = crossover.measured(architecture)
        assert rows
        for one in rows:
            assert one.tokens is None or one.tokens <= one.longest
            # options of another release would never be found
            budget = presets.build(one.method).budget
            share = {} if budget is None else {budget[0]: one.share}
            assert options_of(presets.build(one.method, **one.options, **share)) == one.options
