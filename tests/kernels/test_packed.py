"""Orders without padding, and what of them is remembered."""

import torch

from dit_accel.kernels.packed import compact


def order():
    perm = torch.randperm(10, generator=torch.Generator().manual_seed(0)).view(1, 1, -1)
    return perm, torch.tensor([0, 4, 10], dtype=torch.int32).view(1, 1, -1)


def tokens_of(made):
    return [made.perm[b, 0, : made.offsets[b, 0, -1]].tolist() for b in range(len(made.perm))]


def test_a_mask_is_looked_at_once_and_again_when_it_was_written_to():
    perm, offsets = order()
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 3] = False
    made = compact(perm, offsets, valid)
    every = perm.flatten().tolist()
    assert tokens_of(made) == [every, [token for token in every if token != 3]]
    assert compact(perm, offsets, valid) is made
    valid[0, 5] = False
    wanted = [[token for token in every if token != hidden] for hidden in (5, 3)]
    assert tokens_of(compact(perm, offsets, valid)) == wanted
    assert tokens_of(compact(perm, offsets, ~valid)) == [[5], [3]]
    assert tokens_of(compact(perm, offsets, valid)) == wanted
    assert tokens_of(compact(perm, offsets, None)) == [every]


def test_a_mask_without_a_version_is_looked_at_every_time():
    perm, offsets = order()
    with torch.inference_mode():
        valid = torch.ones(1, 10, dtype=torch.bool)
        first = tokens_of(compact(perm, offsets, valid))
        valid[0, 5] = False
        assert tokens_of(compact(perm, offsets, valid)) == [[t for t in first[0] if t != 5]]


def test_another_order_of_the_same_blocks_is_another_order():
    perm, offsets = order()
    valid = torch.ones(1, 10, dtype=torch.bool)
    compact(perm, offsets, valid)
    assert tokens_of(compact(perm.flip(-1), offsets, valid)) == [perm.flatten().tolist()[::-1]]
