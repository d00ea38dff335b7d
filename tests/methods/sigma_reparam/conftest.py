from __future__ import annotations

import pytest
import torch
from single_layers import LAYERS
from torch import nn


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def made(request):
    """A plain layer with a bias that is not zero, its number of parts, an input."""
    build, num_parts, shape = request.param
    torch.manual_seed(0)
    layer = build()
    nn.init.normal_(layer.weight, std=0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer, num_parts, torch.randn(shape)
