"""The clock, with every way in which diffusers tells the time, or does not."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.pipelines.clock import Clock, Moment


class Scheduler:
    """What the schedulers of diffusers keep of their progress."""

    def __init__(self, steps, begin=None):
        self.timesteps = torch.linspace(1000, 10, steps)
        self.step_index, self.begin_index = None, begin

    def step(self):
        self.step_index = (self.begin_index or 0) if self.step_index is None else self.step_index
        self.step_index += 1


def told(name, step=None, total=None):
    return SimpleNamespace(name=name, step_index=step, num_inference_steps=total)


def brief(moment: Moment):
    return moment.step, moment.num_steps, moment.branch, moment.first


def test_a_full_context_is_believed():
    clock, scheduler = Clock(), Scheduler(3)
    seen = []
    for step in range(3):
        for name in ("cond", "uncond"):
            seen.append(brief(clock.tick(told=told(name, step, 3), scheduler=scheduler)))
        scheduler.step()
    assert seen == [
        (step, 3, name, step == 0 and name == "cond")
        for step in range(3)
        for name in ("cond", "uncond")
    ]


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
@pytest.mark.parametrize("begin", [None, 0, 2])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_the_scheduler_tells_the_step(named, begin, branches):
    clock, scheduler = Clock(), Scheduler(5, begin)
    left = 5 - (begin or 0)
    for call in range(2):
        scheduler.timesteps = scheduler.timesteps.clone()
        scheduler.step_index = None
        for step in range(left):
            now = scheduler.timesteps[step + (begin or 0)]
            for branch in range(branches):
                context = told(f"name{branch}") if named else None
                moment = clock.tick(told=context, scheduler=scheduler, timestep=now)
                name = f"name{branch}" if named else str(branch)
                first = step == 0 and branch == 0
                assert brief(moment) == (step, left, name, first), (call, step, branch)
            scheduler.step()


@pytest.mark.parametrize("branches", [1, 2])
def test_without_anything_timesteps_tell(branches):
    clock = Clock()
    for _ in range(2):
        for step, timestep in enumerate((999.0, 500.0, 20.0)):
            for branch in range(branches):
                moment = clock.tick(timestep=torch.full((2, 7), timestep))
                assert brief(moment) == (step, None, str(branch), step == branch == 0)


def test_a_scheduler_that_nobody_steps_is_found_out():
    """A transformer called by hand, whose pipeline stands by."""
    clock, scheduler = Clock(), Scheduler(5)
    steps = [
        clock.tick(scheduler=scheduler, timestep=torch.tensor([value])).step
        for value in (900.0, 600.0, 300.0)
    ]
    assert steps == [0, 1, 2]


def test_one_name_twice_in_a_step_is_two_branches():
    clock, scheduler = Clock(), Scheduler(2)
    context = told("cond", 0, 2)
    branches = [
        clock.tick(told=context, scheduler=scheduler, timestep=torch.tensor(9.0)).branch
        for _ in range(2)
    ]
    assert branches == ["cond", "cond#1"]


def test_reset_begins_a_call():
    clock, scheduler = Clock(), Scheduler(3)
    clock.tick(told=told("cond", 0, 3), scheduler=scheduler)
    clock.tick(told=told("cond", 1, 3), scheduler=scheduler)
    clock.reset()
    assert clock.tick(told=told("cond", 1, 3), scheduler=scheduler).first


def test_a_step_back_begins_a_call():
    clock = Clock()
    for step in (0, 1, 2):
        clock.tick(told=told("cond", step, 3))
    assert clock.tick(told=told("cond", 0, 3)).first
