"""Local linear attention, its readout alone, and cuDNN's softmax attention of the same shape, measured in one run.

python bench/bench_lla.py [--backward] [--only TEXT] [--store]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer
from nearfield.lla import reference
from rich.console import Console
from rich.table import Table
from timing import header, save, time_ms
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ops = torch.ops.nearfield
PEAK = 800e12  # multiply-adds count twice; what a large 16-bit matrix product reaches on an H100


@dataclass(frozen=True)
class Case:
    T: int
    heads: int
    d: int
    window: int | None = None
    target_fwd: float = 0.0  # milliseconds, eight iterations, causal
    target_readout_fwd: float = 0.0
    target_readout_bwd: float = 0.0

    @property
    def name(self) -> str:
        return f"T{self.T} H{self.heads} D{self.d}" + (f" w{self.window}" if self.window else "")

    @property
    def gemm_ms(self) -> float:
        """One matrix product of depth d over the visible pairs."""
        w = min(self.window or self.T, self.T)
        pairs = w * (w + 1) / 2 + (self.T - w) * w
        return 1e3 * 2 * self.d * pairs * self.heads / PEAK


CASES = [
    Case(2048, 8, 64, target_fwd=0.25),
    Case(4096, 8, 64, target_fwd=0.65, target_readout_fwd=0.152, target_readout_bwd=0.622),
    Case(2048, 8, 128, target_fwd=0.45),
    Case(4096, 8, 128, target_fwd=1.25, target_readout_fwd=0.342, target_readout_bwd=1.378),
    Case(4096, 32, 64, target_fwd=2.3),
    Case(4096, 32, 128, target_fwd=5.0),
    *(Case(T, 8, 64, window=1024) for T in (16384, 65536, 262144)),
]


def check(d: int) -> None:
    """No speed without correctness: a small problem against the float64 definition."""
    q, k, v = (torch.randn(1, 300, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lam = torch.ones(1, 300, 2, 1, device="cuda")
    o = ops.lla_fwd(q, k, v, lam, d**-0.5, True, None, False, 1e-4, 100)[0]
    truth, _ = reference.local_linear_attention(q.double(), k.double(), v.double(), lam=1.0)
    assert float((o - truth).norm() / truth.norm()) < 3e-3


def bench(case: Case, iterations: int, backward: bool) -> dict[str, object]:
    shape, scale = (1, case.T, case.heads, case.d), case.d**-0.5
    q, k, v, d_o = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    lam = torch.ones(*shape[:3], 1, device="cuda")
    fixed = (scale, True, case.window, False, 0.0, iterations)
    row: dict[str, object] = {"case": case.name}

    def timed(name: str, run: object, gemms: int, target: float = 0.0) -> None:
        row[f"{name}_ms"] = ms = time_ms(run, budget_ms=100)  # type: ignore[arg-type]
        row[f"{name}_of_floor"] = gemms * case.gemm_ms / ms
        if target:
            row[f"{name}_target_ms"] = target

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, x, kbar, lse, *_ = ops.lla_fwd(q, k, v, lam, *fixed)
    row["fwd_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    timed("fwd", lambda: ops.lla_fwd(q, k, v, lam, *fixed), 3 * iterations + 5, case.target_fwd)
    timed("tol_1e-3", lambda: ops.lla_fwd(q, k, v, lam, *fixed[:4], 1e-3, 16), 3 * iterations + 5)
    readout = (scale, True, case.window)
    timed("readout_fwd", lambda: ops.lla_probe_fwd(q, x, k, v, *readout), 6, case.target_readout_fwd)
    if backward:
        timed("bwd", lambda: ops.lla_bwd(d_o, q, k, v, lam, x, kbar, lse, *fixed), 3 * iterations + 12)
        timed(
            "readout_bwd",
            lambda: ops.lla_probe_bwd(d_o, q, x, k, v, kbar, lse, *readout),
            14,
            case.target_readout_bwd,
        )
    if case.window is None:
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]

        def cudnn() -> object:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(*heads_first, is_causal=True)

        row["cudnn_fwd_ms"] = time_ms(cudnn, budget_ms=50)
    return row


def main(
    iterations: int = 8, backward: bool = False, only: str = "", store: bool = False, commit: str = ""
) -> None:
    print(header())
    check(64)
    check(128)
    rows = []
    for case in CASES:
        if only in case.name:
            rows.append(bench(case, iterations, backward))
            torch.cuda.empty_cache()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns))
    Console(width=240).print(table)
    if store:
        print(save("lla", rows, commit or None))


if __name__ == "__main__":
    typer.run(main)
