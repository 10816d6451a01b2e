"""The search for settings, in Triton's interpreter and with a clock that is told what to say."""

import pytest
import torch

from dit_accel.eval import tuning
from dit_accel.eval.kernel_cases import SHAPES, inputs
from dit_accel.kernels.tuning import SPACES, files, lookup, overridden, setting

pytest.importorskip("triton")
SMALL = SHAPES["small"]


@pytest.fixture(scope="module")
def parts():
    return inputs(SMALL, torch.float16, "cpu")


@pytest.fixture
def few(monkeypatch):
    """Merge with three candidates and the default."""
    space = SPACES["merge"]
    found = [space.half, *(one for one in space.candidates("half") if one["num_warps"] == 8)][:4]
    monkeypatch.setattr(type(space), "candidates", lambda self, kind: iter(found))
    return found


def clock(times, op="merge"):
    """A timer that goes by the setting in use."""

    def timer(call):
        call()
        like = torch.empty(1, 1, 1, SMALL.head_dim, dtype=torch.float16)
        return times[str(setting(op, like, SMALL.tokens))]

    return timer


def look(timer, parts, op="merge"):
    return tuning.search(op, "small", SMALL, parts, timer, compile_together=False)


def test_the_fastest_that_is_right_is_taken(few, parts):
    times = dict(zip(map(str, few), (10.0, 9.0, 5.0, 7.0), strict=True))
    found = look(clock(times), parts)
    assert found.before == few[0]
    assert found.after == few[2]
    assert (found.before_ms, found.after_ms, found.default_ms) == (10.0, 5.0, 10.0)
    assert (found.tried, found.failed, found.wrong) == (3, 0, 0)
    assert found.tokens == 256, "192 tokens are in the range that ends there"
    assert "10.000 -> 5.000 ms" in tuning.told(found)


def test_a_gain_within_noise_changes_nothing(few, parts):
    times = dict(zip(map(str, few), (10.0, 9.9, 9.85, 9.81), strict=True))
    assert look(clock(times), parts).after == few[0]


def test_a_time_that_was_luck_changes_nothing(few, parts):
    asked = {}

    def timer(call):
        now = str(setting("merge", torch.empty(1, 1, 1, SMALL.head_dim).half(), SMALL.tokens))
        asked[now] = asked.get(now, 0) + 1
        if now == str(few[2]) and asked[now] == 1:
            return 1.0
        return {str(few[0]): 10.0, str(few[3]): 9.0}.get(now, 9.9)

    found = look(timer, parts)
    assert (found.after, found.after_ms, found.before_ms) == (few[3], 9.0, 10.0)
    assert asked[str(few[2])] > 1


def test_a_kernel_that_reads_no_settings_is_left_alone(few, parts, monkeypatch):
    # as where a device has a kernel of its own for the operation
    monkeypatch.setattr(tuning, "PROBLEMS", {"merge": lambda shape, parts: lambda: parts[0]})
    assert look(lambda call: pytest.fail("it was timed"), parts) is None


def test_what_is_wrong_or_does_not_run_is_not_taken(few, parts, monkeypatch):
    times = dict(zip(map(str, few), (10.0, 1.0, 2.0, 7.0), strict=True))
    real = tuning.PROBLEMS["merge"]

    def problem(shape, parts):
        call = real(shape, parts)

        def changed():
            out, lse = call()
            now = setting("merge", out, SMALL.tokens)
            if now == few[1]:
                raise RuntimeError("out of resources")
            return (out + 0.01 if now == few[2] else out), lse

        return changed

    monkeypatch.setattr(tuning, "PROBLEMS", {"merge": problem})
    found = look(clock(times), parts)
    assert found.after == few[3]
    assert (found.failed, found.wrong) == (1, 1)


def test_what_is_compared_with_is_what_is_in_use(few, parts):
    times = dict(zip(map(str, few), (10.0, 8.0, 7.0, 7.9), strict=True))
    with overridden("merge", few[1]):
        found = look(clock(times), parts)
        assert setting("merge", parts[0], 5) == few[1]
    assert found.before == few[1]
    assert found.after == few[2]
    assert found.default_ms == 10.0


@pytest.mark.parametrize("op", SPACES)
def test_every_kernel_has_a_problem_that_its_settings_change_nothing_of(op, parts):
    call = tuning.PROBLEMS[op](SMALL, parts)
    wanted = call()
    candidates = list(SPACES[op].candidates("half"))
    seen = []
    for candidate in (candidates[1], candidates[-1]):
        with overridden(op, candidate):
            seen.append(tuning.agrees(call(), wanted))
    assert seen == [True, True]
    spoilt = [x + 1 for x in tuning._tensors(wanted)]
    assert not tuning.agrees(spoilt, wanted)


def test_results_are_kept_beside_those_of_other_shapes(few, parts, tmp_path, monkeypatch):
    times = dict(zip(map(str, few), (10.0, 9.0, 5.0, 7.0), strict=True))
    found = look(clock(times), parts)
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    path = tuning.keep([found], 90, "a card")
    assert path == tmp_path / "sm_90.json"
    (entry,) = files.read(path, 90).entries
    assert (entry.op, entry.tokens, entry.setting) == ("merge", 256, dict(few[2].values))
    tuning.keep([look(clock(times), parts, "merge")], 90, "a card")
    assert len(files.read(path, 90).entries) == 1
    monkeypatch.setattr(lookup, "architecture_of", lambda device: 90)
    lookup.forget()
    assert setting("merge", parts[0], 200) == few[2]
    lookup.forget()


def test_ties_between_labels_are_no_error():
    old = torch.zeros(2000, dtype=torch.int64)
    new = old.clone()
    new[0] = 1
    assert tuning.agrees(new, old)
    new[:10] = 1
    assert not tuning.agrees(new, old)
