import json

import pytest
import torch

from dit_accel.eval import attention_cases, bench_kernels, kernel_checks, memory_cases
from dit_accel.eval.kernel_cases import SHAPES, Shape, inputs
from dit_accel.eval.method_cases import method_cases


def test_rows_are_written(tmp_path, capsys):
    out = tmp_path / "run.json"
    words = ["--ops", "error_probe,block_importance,gate", "--shapes", "small", "--device", "cpu"]
    assert bench_kernels.main([*words, "--dtype", "float32", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["command"][2:5] == ["dit_accel.eval.bench_kernels", "--ops", words[1]]
    assert {row["op"] for row in found["rows"]} == set(words[1].split(","))
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in found["rows"])
    assert "block_importance, D=64: correct" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch):
    def wrong(*arguments, **options):
        return real(*arguments, **options) * 1.01

    real = kernel_checks.block_importance
    # both sides go through this name: only the one that is asked for by name stays right
    monkeypatch.setattr(
        kernel_checks,
        "block_importance",
        lambda *a, **o: real(*a, **o) if "backend" in o else wrong(*a, **o),
    )
    said = []
    found = bench_kernels.run(
        ["block_importance"], ["small"], dtype="float32", device="cpu", say=said.append
    )
    assert [row["error"][:44] for row in found["rows"]] == [
        "not timed: IncorrectError: block_importance:"
    ]
    assert "not timed" in bench_kernels.table(found["rows"])


def test_norms_and_statistics(monkeypatch):
    """Beside diffusers' arithmetic; and not where they are wrong."""
    options = {"dtype": "float32", "device": "cpu", "say": lambda text: None}
    found = bench_kernels.run(["norm_rotary", "block_summary"], ["small"], **options)
    assert [row["case"] for row in found["rows"]] == [
        "in one pass",
        "diffusers' arithmetic",
        "means of queries",
        "means of keys and values",
        "and variances",
        "and covariances",
    ]
    assert all(row["ms"] > 0 and row["gbs"] > 0 for row in found["rows"])

    def wrong(*arguments, **options):
        q, k, v = norm_rotary(*arguments, **options)
        return q, k * 1.0001, v

    norm_rotary = memory_cases.norm_rotary
    monkeypatch.setattr(memory_cases, "norm_rotary", wrong)
    (row,) = bench_kernels.run(["norm_rotary"], ["small"], **options)["rows"]
    assert row["error"].startswith("not timed: IncorrectError: norm_rotary over each head")


def test_attention_by_plans_that_are_there():
    found = bench_kernels.run(
        ["block_attention", "plan", "merge"],
        ["small"],
        dtype="float32",
        device="cpu",
        say=lambda text: None,
    )
    rows = {(row["op"], row["case"]): row for row in found["rows"]}
    assert all(row["ms"] > 0 and row["gbs"] > 0 for row in rows.values())
    exact, pooled = (
        rows["block_attention", name] for name in ("exact blocks alone", "with moments")
    )
    assert exact["note"] == pooled["note"]
    assert ("plan", "2 x 3") in rows
    assert ("merge", "two partials") in rows


@pytest.mark.parametrize(
    ("name", "where"),
    [("block_attention", "block_attention drop lse"), ("merge", "merge lse"), ("plan", "plan")],
)
def test_attention_that_is_wrong_is_not_timed(monkeypatch, name, where):
    """By a little: half a thousandth, or one pair of blocks."""

    def wrong(*given, backend="auto", **options):
        found = real(*given, backend=backend, **options)
        if backend != "auto":
            return found
        if name == "plan":
            found[0, 0, 0, 0] = -found[0, 0, 0, 0]
            return found
        return found[0], found[1] * (1 + 5e-4)

    called = "pooled_topk" if name == "plan" else name
    real = getattr(attention_cases, called)
    monkeypatch.setattr(attention_cases, called, wrong)
    (row,) = bench_kernels.run(
        [name], ["small"], dtype="float32", device="cpu", say=lambda text: None
    )["rows"]
    assert row["error"].startswith(f"not timed: IncorrectError: {where}: expected")


@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 3, 3), (2, 2, 4)])
def test_both_sides_of_norm_rotary_are_one_computation(grid):
    """Text before an image, after a clip, and none."""
    shape = Shape(grid, 2, text=0 if grid == (2, 2, 4) else 5, head_dim=16)
    parts = inputs(shape, torch.float32, "cpu")
    made = [case.call() for case in memory_cases.norm_rotary_cases(shape, parts)]
    for mine, theirs in zip(*made, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_inputs_differ_by_head_and_can_be_repeated():
    shape = SHAPES["small"]
    first, again = (inputs(shape, torch.float32, "cpu", seed=1) for _ in range(2))
    assert first[0].shape == (1, shape.heads, shape.tokens, shape.head_dim)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][:, 0], first[0][:, 1])


def test_broad_inputs_attend_to_more_keys():
    shape = SHAPES["small"]
    shares = []
    for strength in ("sharp", "broad"):
        q, k, _ = inputs(shape, torch.float32, "cpu", strength=strength)
        share = (q @ k.mT * shape.head_dim**-0.5).softmax(-1)
        shares.append(float((share.square().sum(-1) ** -1).mean()))
    assert shares[1] > 2 * shares[0]


def test_ranks_of_psa_cost_what_they_say():
    shape = SHAPES["small"]
    parts = inputs(shape, torch.float32, "cpu")
    notes = {case.name: case.note for case in method_cases(shape, parts)}
    assert "with means" in notes["psa, work 0.15"]
    assert "with means" not in notes["pisa"]


def test_unknown_names_are_told(capsys):
    for words, message in (
        (["--ops", "sort"], "--ops: expected some of dense, error_probe"),
        (["--shapes", "wan"], "--shapes: expected some of wan14b"),
    ):
        with pytest.raises(SystemExit):
            bench_kernels.main(words)
        assert message in capsys.readouterr().err


def test_groups_of_heads_beside_all_at_once(monkeypatch):
    from dit_accel.eval.method_cases import head_group_cases
    from dit_accel.kernels.block_attention import groups
    from dit_accel.method import Method

    seen = []
    real = Method.__call__
    monkeypatch.setattr(
        Method,
        "__call__",
        lambda self, *given: seen.append(groups.COPY_BYTES) or real(self, *given),
    )
    parts = inputs(SHAPES["small"], torch.float32, "cpu")
    one_head = 2 * parts[1][0, 0].numel() * 4
    monkeypatch.setattr(groups, "COPY_BYTES", one_head)
    some, whole = head_group_cases(SHAPES["small"], parts)
    assert (some.name, whole.name) == ("groups of heads: 2", "all heads at once")
    assert whole.note == "the same bits"
    seen.clear()
    some.call()
    whole.call()
    assert seen == [one_head, float("inf")]
    assert one_head == groups.COPY_BYTES
