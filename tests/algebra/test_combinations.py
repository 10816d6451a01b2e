"""Any layout with any route that makes sense with any rest."""

import pytest
import torch

import dit_accel
from dit_accel import Method, components
from dit_accel.cluster import KMeans
from dit_accel.combinations import LAYOUTS, RESTS, ROUTES, table

GRID = (3, 4, 5)
EVERY = list(table())
TRIPLES = [(one.layout, one.route, one.rest) for one in EVERY if one.reason is None]


@pytest.mark.parametrize(("layout", "route", "rest"), TRIPLES)
def test_whatever_is_not_refused_runs(layout, route, rest):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 67, 5, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 67, generator=generator) < 0.9
    small = components.make("layout", layout, block_size=8)
    made = KMeans(4, 6) if layout == "kmeans" else small
    method = Method(made, ROUTES[route], RESTS[rest])
    where = {"grid": GRID, "text": slice(60, 67), "key_valid": valid, "layer": 2}
    out, report = dit_accel.attention(q, k, v, method, return_report=True, **where)
    assert out.isfinite().all()
    assert 0 < report.density <= 1
    text = torch.softmax(
        (q[:, :, 60:] @ k.mT * 5**-0.5).masked_fill(~valid[:, None, None], -torch.inf), -1
    )
    torch.testing.assert_close(out[:, :, 60:], text @ v, rtol=0, atol=1e-12)


def test_what_is_refused_has_a_reason():
    refused = {(one.layout, one.route, one.rest): one.reason for one in EVERY if one.reason}
    assert set(refused) == {
        (layout, route, rest)
        for layout in LAYOUTS
        for route, rest in (
            ("gate", "taylor, rest"),
            ("gate", "moment, rest"),
            *(("pyramid", rest) for rest in RESTS if rest != "drop"),
        )
    }
    assert all(len(reason) > 20 for reason in refused.values())
    assert len(EVERY) == len(LAYOUTS) * len(ROUTES) * len(RESTS)
