"""What a denoiser or model was called with, by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from patchkit.tracker import Tracker


class Plain(torch.nn.Module):
    def forward(self, hidden_states: Any, timestep: Any = None, *, grid: Any = None) -> None: ...


class Collecting(torch.nn.Module):
    def forward(self, hidden_states: Any, *others: Any, **kwargs: Any) -> None: ...


CALLS = [
    ((), {"hidden_states": 1, "timestep": 2}),
    ((1,), {"timestep": 2, "grid": 3}),
    ((1, 2), {}),
    ((), {}),
]


@pytest.mark.parametrize("cls", [Plain, Collecting])
@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_inputs_by_name_are_what_python_would_bind(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module = cls()
    bound = inspect.signature(cls.forward).bind_partial(module, *args, **kwargs)
    wanted = {name: value for name, value in bound.arguments.items() if name != "self"}
    wanted.update(wanted.pop("kwargs", {}))
    tracker = Tracker(module, {}, lambda *_: None, lambda: None)
    assert tracker.bind(module, args, kwargs) == wanted


@pytest.mark.parametrize(("args", "kwargs"), [((1, 2, 3), {}), ((1,), {"hidden_states": 2, "grid": 3})])
def test_a_call_that_is_wrong_is_left_to_the_module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tracker = Tracker(torch.nn.Identity(), {}, lambda *_: None, lambda: None)
    assert tracker.bind(Plain(), args, kwargs) == kwargs
    with pytest.raises(TypeError):
        Plain()(*args, **kwargs)
