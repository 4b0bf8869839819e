"""``explain``: what a call would run. Every family registers how its operators explain themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_EXPLAINERS: dict[Callable[..., Any], Callable[..., Explanation]] = {}
_Explainer = TypeVar("_Explainer", bound="Callable[..., Explanation]")


@dataclass(frozen=True)
class Explanation:
    """What a call would run; families add fields. ``print`` it."""

    operator: str
    architecture: str
    """``"cpu"``, or a GPU's compute capability as ``"sm_90"``."""


def explains(operator: Callable[..., Any]) -> Callable[[_Explainer], _Explainer]:
    """Registers the decorated ``explainer(architecture, *args, **kwargs)`` for a public operator."""

    def register(explainer: _Explainer) -> _Explainer:
        _EXPLAINERS[operator] = explainer
        return explainer

    return register


def explain(
    operator: Callable[..., Any], /, *args: Any, architecture: str | None = None, **kwargs: Any
) -> Explanation:
    """What ``operator(*args, **kwargs)`` would run, and why, without running it.

    Args:
        operator: a public function of nearfield, for instance ``neighborhood_attention``.
        *args: the operator's arguments. Tensors of the meta device will do, so that nothing is allocated:
            ``torch.empty(shape, dtype=torch.bfloat16, device="meta")``.
        architecture: ``"cpu"`` or a compute capability such as ``"sm_90"``, present or not; None: that of the
            first tensor's device.
        **kwargs: the operator's keyword arguments.

    Returns:
        A dataclass with a readable ``str``. A call without a kernel is not an error here: the explanation says why
        it is refused. Wrong arguments raise as they do in the call itself.
    """
    if operator not in _EXPLAINERS:
        known = ", ".join(sorted(f.__name__ for f in _EXPLAINERS))
        name = getattr(operator, "__name__", repr(operator))
        raise NotImplementedError(f"explain: {name} cannot be explained; supported: {known}")
    if architecture is None:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        architecture = _architecture_of(tensor)
    elif architecture != "cpu" and not (architecture.startswith("sm_") and architecture[3:].isdigit()):
        raise ValueError(
            f"explain: architecture is {architecture!r}, expected 'cpu' or, for instance, 'sm_90'"
        )
    return _EXPLAINERS[operator](architecture, *args, **kwargs)


def _architecture_of(tensor: Tensor | None) -> str:
    if tensor is not None and tensor.device.type == "cpu":
        return "cpu"
    if tensor is not None and tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return f"sm_{major}{minor}"
    raise ValueError(
        "explain: name an architecture, 'cpu' or for instance 'sm_90': the tensors are on no device"
    )
