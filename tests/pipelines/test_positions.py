"""Grids read from the positions that FLUX is given."""

import pytest
import torch

from dit_accel import InputError
from dit_accel.pipelines.positions import grids_of


def positions(*images, axes=3):
    """Of images with so many rows and columns."""
    return torch.cat(
        [
            torch.cartesian_prod(
                torch.tensor([10 * i]),
                torch.arange(rows),
                torch.arange(columns),
                *[torch.arange(1)] * (axes - 3),
            )
            for i, (rows, columns) in enumerate(images)
        ]
    ).float()


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize(
    "images", [[(6, 5)], [(1, 7)], [(7, 1)], [(1, 1)], [(6, 5), (6, 5)], [(2, 9), (5, 3), (1, 1)]]
)
def test_every_image_is_a_grid(images, axes):
    ids = positions(*images, axes=axes)
    wanted = tuple((1, *image) for image in images)
    assert grids_of(ids, axes) == wanted
    assert grids_of(ids.unsqueeze(0).expand(3, -1, -1), axes) == wanted
    assert grids_of(ids + torch.arange(1.0, axes + 1), axes) == wanted
    with torch.inference_mode():
        assert grids_of(positions(*images, axes=axes), axes) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image", [(300, 4), (3, 700), (600, 520)])
def test_half_precision_runs_positions_together(image, dtype):
    """FLUX.1 gives positions in the dtype of its latents; bf16 counts to 256."""
    assert grids_of(positions(image).to(dtype), 3) == ((1, *image),)


def test_a_tensor_with_other_contents_is_read_again():
    ids = positions((3, 200))
    assert grids_of(ids, 3) == ((1, 3, 200),)
    ids.copy_(positions((200, 3)))
    assert grids_of(ids, 3) == ((1, 200, 3),)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (positions((6, 5)).flip(0), "got 30 of one image that make no grid"),
        (positions((6, 5))[:-1], "got 29 of one"),
        (positions((6, 5))[torch.randperm(30, generator=torch.Generator().manual_seed(0))], "30"),
        (positions((2, 3), (6, 5))[:-1], "got 29 of one"),
        (positions((6, 5))[:, :2], r"positions \[L, 3\], got \[30, 2\]"),
        (positions((6, 5))[:0], "got 0 of one"),
        (None, r"positions \[L, 3\], got NoneType"),
    ],
)
def test_what_makes_no_grid(wrong, got):
    with pytest.raises(InputError, match=got):
        grids_of(wrong, 3)
