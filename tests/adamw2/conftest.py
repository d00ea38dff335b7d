"""Every test of AdamW2 runs by the kernels where they are installed, and by torch alone."""

from __future__ import annotations

import pytest

from hf_stable.kernels.choosing import SWITCH


@pytest.fixture(autouse=True, params=["kernels", pytest.param("torch", marks=pytest.mark.slow)])
def path(request, monkeypatch):
    """Choose what steps the weights: "kernels" is the default, "torch" leaves all to torch."""
    monkeypatch.setenv(SWITCH, "" if request.param == "kernels" else "torch")
    return request.param
