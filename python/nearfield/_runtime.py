"""Loads the compiled operators, and what every family's ``op.py`` shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from nearfield import _C  # type: ignore[attr-defined]  # noqa: F401  (importing it registers torch.ops.nearfield.*)
except ImportError as error:
    raise ImportError(
        "nearfield's compiled library nearfield/_C.abi3.so could not be loaded. Build it with "
        "`pip install --no-build-isolation .` (or `python setup.py build_ext --inplace`) in the torch environment "
        f"you run. The loader said: {error}"
    ) from error

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating-point tensors to the autocast dtype when autocast is on for their device, as SDPA does; 8 bits stay."""
    device_type = tensors[0].device.type
    # The meta device has no autocast, and asking raises; torch.amp.is_autocast_available would break the graph in 2.11.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype, kept = torch.get_autocast_dtype(device_type), (torch.float64, torch.float8_e4m3fn)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype not in kept else t for t in tensors)


def shape_error(op: str, name: str, given: Tensor, expected: str) -> NoReturn:
    """The one sentence for a wrong shape: the argument, what was given, what is supported."""
    raise ValueError(f"{op}: {name} has shape {list(given.shape)}, expected {expected}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is dense, without a forward derivative, on one device; the first one sets the device."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise NotImplementedError(f"{op}: {name} is a sparse or nested tensor; supported: dense tensors")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first_name} is on {first.device}")
        # The operators have no rule for it, and torch would drop it silently.
        if forward_mode and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{op}: {name} has a tangent of forward-mode differentiation; supported: backward mode"
            )


def check_same_dtype(
    op: str, *, supported: tuple[torch.dtype, ...] = FLOAT_DTYPES, **tensors: Tensor | None
) -> None:
    """The named tensors share one supported floating-point dtype."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    if first.dtype not in supported:
        names = ", ".join(str(d).removeprefix("torch.") for d in supported)
        raise NotImplementedError(f"{op}: {first_name} has dtype {first.dtype}; supported: {names}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, but {first_name} has {first.dtype}")


def sentence(error: Exception) -> str:
    """What an operator said: torch puts the place in the source in front of it, and sometimes a trace behind."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\S+, \S+:\d+, ", "", first)


def is_refusal(error: Exception) -> bool:
    """Whether the error says that the call is not supported, and not that something broke.

    A refusal says what is supported instead; other errors do not.
    """
    return re.search(r"supported|this build (is for|has no kernel|lacks a)", str(error)) is not None


def differentiated(inputs: Iterable[object]) -> bool:
    """Whether autograd is to record a call with these inputs."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _remember_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def differentiable(
    operator: str, backward: Callable[..., Any], setup_context: Callable[..., None] = _remember_nothing
) -> Callable[..., Any]:
    """Gives ``nearfield::<operator>`` its gradient. Returns the operator as Python calls it, with every argument.

    ``torch.library``'s own rule serves compilers and direct calls. It looks up the default of every argument in each
    differentiated call, 150 to 220 us on the host, which an autograd function around the operator spares eager code.
    """
    torch.library.register_autograd(f"nearfield::{operator}", backward, setup_context=setup_context)
    overload = getattr(torch.ops.nearfield, operator).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = overload(*inputs)
            setup_context(ctx, inputs, output)
            return output

    class Transformed(torch.autograd.Function):
        """As torch.func wants it, which takes longer to enter."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return overload(*inputs)

    Transformed.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    for rule in (Eager, Transformed):
        rule.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*inputs: Any) -> Any:
        if not differentiated(inputs) or torch.compiler.is_compiling():
            return overload(*inputs)
        rule = Transformed if torch._C._are_functorch_transforms_active() else Eager
        return rule.apply(*inputs)  # type: ignore[no-untyped-call]

    return call


def devices_with_kernel(operator: str) -> frozenset[str]:
    """Device types for which this build has a kernel of ``nearfield::<operator>``. Call it at import."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return frozenset(d for d, key in keys.items() if has(f"nearfield::{operator}", key)) | {"meta"}


def check_device(op: str, tensor: Tensor, devices: frozenset[str]) -> None:
    """Raises when this build has no kernel for the tensor's device: never a silent detour through another one."""
    if tensor.device.type not in devices:
        supported = ", ".join(sorted(devices - {"meta"}))
        raise NotImplementedError(
            f"{op}: no kernel for device {tensor.device} in this build; supported: {supported}"
        )
