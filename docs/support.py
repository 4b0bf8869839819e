"""The README's table of what has CUDA kernels, asked of ``nearfield.explain``: python docs/support.py writes it.

Needs a build for compute capability 9.0, which can be asked for both sets of kernels; no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nearfield import (
    delta_rule,
    explain,
    local_linear_attention,
    neighborhood_attention,
    neighborhood_local_linear_attention,
    neighborhood_probe_attention,
    probe_attention,
)
from nearfield._files import write_atomically
from nearfield._runtime import FLOAT_DTYPES
from torch import Tensor

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support: python docs/support.py -->", "<!-- /support -->"
BACKENDS = {"hopper": "Hopper's own kernels", "portable": "portable kernels: NVIDIA GPUs since Ampere"}
SIZES = (*range(1, 289), 512, 1000, 1024)
Passes = frozenset[str]  # of "forward" and "backward"


@dataclass(frozen=True)
class Operator:
    name: str
    dims: dict[str, Callable[[int, torch.dtype, str], Any]]
    """What is varied -> the explanation of a call in that size, in that type, by those kernels."""


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, 64, 2, *shape, dtype=dtype, device="meta")


def ask(operator: Any, *args: Any, backend: str) -> Any:
    return explain(operator, *args, backend=backend, architecture="sm_90")


def neighborhood(size: int, dtype: torch.dtype, backend: str) -> Any:
    q = meta(size, dtype=dtype)
    return ask(neighborhood_attention, q, q, q, 7, backend=backend)


def delta(keys: int, values: int, dtype: torch.dtype, backend: str) -> Any:
    """With the gate that asks most of a kernel."""
    q, v, beta = (meta(*shape, dtype=dtype) for shape in ((keys,), (values,), ()))
    return ask(delta_rule, q, q, v, beta, q, backend=backend)


def local_linear(operator: Any, tensors: int, *window: int) -> Callable[[int, torch.dtype, str], Any]:
    return lambda size, dtype, backend: ask(
        operator, *[meta(size, dtype=dtype)] * tensors, *window, backend=backend
    )


OPERATORS = [
    Operator("neighborhood_attention", {"head dims": neighborhood}),
    Operator(
        "delta_rule",
        {
            "K": lambda size, dtype, backend: delta(size, 64, dtype, backend),
            "V": lambda size, dtype, backend: delta(64, size, dtype, backend),
        },
    ),
    Operator("local_linear_attention", {"head dims": local_linear(local_linear_attention, 3)}),
    Operator("probe_attention", {"head dims": local_linear(probe_attention, 4)}),
    Operator(
        "neighborhood_local_linear_attention",
        {"head dims": local_linear(neighborhood_local_linear_attention, 3, 7)},
    ),
    Operator("neighborhood_probe_attention", {"head dims": local_linear(neighborhood_probe_attention, 4, 7)}),
]


def passes(told: Any) -> Passes:
    """Those that have a kernel."""
    parts = {name: getattr(told, name, told) for name in ("forward", "backward")}
    return frozenset(name for name, part in parts.items() if not part.refused)


def sizes_text(sizes: Iterable[int]) -> str:
    found = sorted(sizes)
    step = found[0]
    assert found == [size for size in SIZES if size % step == 0 and size <= found[-1]], found
    multiples = f"multiples of {step}" if step > 1 else ""
    if found[-1] == max(size for size in SIZES if size % step == 0):
        return multiples or "any"
    return f"{multiples} up to {found[-1]}".strip()


def cell(operator: Operator, backend: str) -> str:
    """One sentence, the same for every type that has kernels."""
    texts: dict[str, list[str]] = {}
    for dtype in FLOAT_DTYPES:
        parts, found = [], set[str]()
        for dim, call in operator.dims.items():
            answers = {size: passes(call(size, dtype, backend)) for size in SIZES}
            by_pass = {p: [s for s in SIZES if p in answers[s]] for p in ("forward", "backward")}
            found |= {p for p, sizes in by_pass.items() if sizes}
            texts_of = {p: sizes_text(sizes) for p, sizes in by_pass.items() if sizes}
            if len(set(texts_of.values())) == 1:
                parts.append(f"{dim} {texts_of['forward']}")
            else:
                parts += [f"{dim} {text} in the {p}" for p, text in texts_of.items()]
        if found:
            both = ", ".join(p for p in ("forward", "backward") if p in found)
            texts.setdefault("; ".join([both, ", ".join(parts)]), []).append(
                str(dtype).removeprefix("torch.")
            )
    return "; ".join(f"{', '.join(dtypes)}; {text}" for text, dtypes in texts.items()) or "none"


def table() -> str:
    head = ["operator", *BACKENDS.values()]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{o.name}`", *(cell(o, backend) for backend in BACKENDS)] for o in OPERATORS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert(text: str, content: str) -> str:
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no place for the table: {BEGIN} and {END} are expected")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


if __name__ == "__main__":
    write_atomically(README, insert(README.read_text(), table()))
