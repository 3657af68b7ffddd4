"""What a decode step costs beside arithmetic: calls of Python functions, which can be counted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, filled
from conftest import make_ids, make_model

PACKAGE = str(Path(tqai.__file__).parent)
MOST_A_LAYER = 60


def calls_of_a_step(layers: int, **options: Any) -> int:
    """Calls of tqai's own functions in a decode step after a prompt with sealed tokens."""
    model = make_model("llama", num_hidden_layers=layers)
    cache = filled(model, tqai.patch(model, **SEALING, **options), make_ids(1, 150))
    token = make_ids(1, 1)
    for _ in range(2):  # something may be learnt at a first step
        filled(model, cache, token)
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        with torch.no_grad():
            model(token, past_key_values=cache)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("options", [{}, {"centering": "none"}])
def test_a_step_calls_few_functions_a_layer(options: dict[str, Any]) -> None:
    few, many = (calls_of_a_step(layers, **options) for layers in (2, 6))
    assert (many - few) / 4 <= MOST_A_LAYER, (few, many)
