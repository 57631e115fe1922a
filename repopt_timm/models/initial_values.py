"""The values that scales started from, found by the name of their network."""

import timm
import torch

from ..architectures import ARCHITECTURES, chosen_numbers
from ..names import PREFIX
from ..scales import Scales
from .twins import ensure_registered


def initial_values(scales: Scales) -> Scales | None:
    """Returns the initial values for the network that scales state; None if timm does not know its name."""
    name = scales.architecture if scales.architecture in ARCHITECTURES else PREFIX + scales.architecture
    ensure_registered(name)
    if not timm.is_model(name):
        return None
    with torch.device('meta'):
        return Scales.initial(timm.create_model(name, **chosen_numbers(scales)))
