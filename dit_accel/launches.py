"""What is asked of the kernels before work starts."""

from __future__ import annotations

import torch

from dit_accel.errors import InputError
from dit_accel.kernels.tuning import lookup


def check_settings(device: torch.device) -> None:
    """Raise an InputError if a file of kernels' settings for a device is there and is not right.

    The first launch would refuse it as well, in the middle of a generation.
    """
    try:
        lookup.check(device)
    except ValueError as error:
        raise InputError(str(error)) from None
