"""Neighborhood attention beside dense attention of the same shape (cuDNN's, for the portable kernels
FlashAttention-2, which uses the same instructions), measured in one run.

python bench/bench_gna.py [--backward] [--only TEXT] [--backend hopper|portable] [--store]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer
from nearfield import neighborhood_attention
from nearfield.gna.reference import visible_keys
from rich.console import Console
from rich.table import Table
from timing import header, save, time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    name: str
    size: tuple[int, ...]
    heads: int
    dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    batch: int = 1
    target_fwd: float = 0.0  # milliseconds
    target_bwd: float = 0.0

    @property
    def parameters(self) -> dict[str, tuple[int, ...] | tuple[bool, ...]]:
        n = len(self.size)
        return {"stride": self.stride or (1,) * n, "is_causal": self.causal or (False,) * n}


VIDEO = (True, False, False)
CASES = [
    Case("Hunyuan s1", (30, 48, 80), 24, 128, (18, 24, 24), target_fwd=40, target_bwd=140),
    Case("Hunyuan s16,8,8", (30, 48, 80), 24, 128, (18, 24, 24), (16, 8, 8), target_fwd=24.5, target_bwd=75),
    Case("FLUX s1", (256, 256), 24, 128, (80, 80), target_fwd=11.5, target_bwd=36),
    Case("FLUX s16", (256, 256), 24, 128, (80, 80), (16, 16), target_fwd=8.6, target_bwd=26),
    Case("Cosmos s1", (16, 44, 80), 32, 128, (16, 32, 48), target_fwd=42, target_bwd=120),
    Case("Cosmos s1,8,16", (16, 44, 80), 32, 128, (16, 32, 48), (1, 8, 16), target_fwd=36.5, target_bwd=112),
    Case("1-D w1024", (16384,), 16, 128, (1024,), target_fwd=0.27, target_bwd=0.80),
    Case("1-D w1024 causal", (16384,), 16, 128, (1024,), causal=(True,), target_fwd=0.27, target_bwd=0.85),
    Case("1-D w2048", (65536,), 16, 128, (2048,), target_fwd=1.95, target_bwd=5.8),
    Case("NAT D32", (56, 56), 4, 32, (7, 7), batch=64, target_fwd=0.45, target_bwd=1.1),
    Case("NAT D64", (56, 56), 4, 64, (7, 7), batch=64, target_fwd=0.50, target_bwd=1.2),
    Case("Frame-causal", (30, 32, 32), 24, 128, (30, 32, 32), causal=VIDEO),
    Case("Dense T8192", (8192,), 16, 128, (8192,)),
    Case("Dense T8192 causal", (8192,), 16, 128, (8192,), causal=(True,)),
    Case("Dense D256", (8192,), 8, 256, (8192,)),
    Case("2-D D256", (128, 128), 8, 256, (32, 32)),
    Case("Dense D64", (128, 128), 16, 64, (128, 128)),
]  # fmt: skip


def flop_bound(case: Case) -> float:
    """Largest speedup over dense attention: all pairs over the pairs that are needed."""
    bound = 1.0
    windows = zip(case.size, case.window, *case.parameters.values(), strict=True)
    for length, window, stride, causal in windows:
        bound *= length**2 / sum(
            len(visible_keys(x, length, window, stride, 1, bool(causal))) for x in range(length)
        )
    return bound


def bench(case: Case, backward: bool, dense: bool, backend: str | None) -> dict[str, object]:
    shape = (case.batch, *case.size, case.heads, case.dim)
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    tokens = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
    row: dict[str, object] = {"case": case.name}

    def ours() -> object:
        return neighborhood_attention(q, k, v, case.window, backend=backend, **case.parameters)  # type: ignore[arg-type]

    peer, name = SDPBackend.CUDNN_ATTENTION, "cudnn"
    if backend == "portable":
        peer, name = SDPBackend.FLASH_ATTENTION, "flash"

    def sdpa(causal: bool = False) -> Tensor:
        with sdpa_kernel(peer):
            return scaled_dot_product_attention(*tokens, is_causal=causal)

    # Gradients of head dims above 128 are not in every cuDNN; then the row says so.
    if backward and dense and case.dim > 128:
        tokens = [t.requires_grad_() for t in tokens]
        try:
            torch.autograd.grad(sdpa(), tokens, torch.ones_like(tokens[0]))
        except RuntimeError:
            peer, name = SDPBackend.FLASH_ATTENTION, "flash"

    n = torch.Size(case.size).numel()
    dense_flops = 4.0 * n * n * case.dim * case.heads * case.batch
    bound = flop_bound(case)
    row["fwd_ms"] = time_ms(ours)
    row["fwd_useful_tflops"] = dense_flops / bound / row["fwd_ms"] / 1e9  # type: ignore[operator]
    row["fwd_target_ms"] = case.target_fwd
    line_causal = case.causal == (True,) and case.window == case.size
    if dense:
        row[f"{name}_fwd_ms"] = time_ms(lambda: sdpa(line_causal), budget_ms=200)
        row["fwd_speedup"] = row[f"{name}_fwd_ms"] / row["fwd_ms"]  # type: ignore[operator]
        row["flop_bound"] = 1.0 if line_causal else bound
    if backward:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = ours()
        row["bwd_ms"] = time_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        row["bwd_target_ms"] = case.target_bwd
        row["bwd_useful_tflops"] = 2.5 * dense_flops / bound / row["bwd_ms"] / 1e9  # type: ignore[operator]
        if dense:
            tokens = [t.requires_grad_() for t in tokens]
            reference, grad = sdpa(line_causal), dout.flatten(1, -3).transpose(1, 2)
            row[f"{name}_bwd_ms"] = time_ms(
                lambda: torch.autograd.grad(reference, tokens, grad, retain_graph=True), budget_ms=200
            )
            row["bwd_speedup"] = row[f"{name}_bwd_ms"] / row["bwd_ms"]  # type: ignore[operator]
    return row


def show(rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns))
    Console(width=200).print(table)


def main(
    backward: bool = False,
    only: str = "",
    dense: bool = True,
    backend: str | None = None,
    store: bool = False,
    commit: str = "",
) -> None:
    print(header())
    rows = []
    for case in CASES:
        if only in case.name:
            rows.append(bench(case, backward, dense, backend))
            torch.cuda.empty_cache()
    show(rows)
    if store:
        print(save("gna" if backend is None else f"gna-{backend}", rows, commit or None))


if __name__ == "__main__":
    typer.run(main)
