"""Decoding beside the memory roof: the bandwidth of a plain copy, measured in the same run.

python bench/bench_decode.py [--store]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import typer
from nearfield.delta import delta_rule_step
from nearfield.lla import local_linear_attention_step
from rich.console import Console
from rich.table import Table
from timing import header, host_us, save, time_ms
from torch.nn.functional import scaled_dot_product_attention


def copy_gb_per_s(num_bytes: int) -> float:
    """Bytes read plus bytes written per second of a device-to-device copy of ``num_bytes`` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return num_bytes / time_ms(lambda: target.copy_(source)) / 1e6


def delta_row(B: int, HV: int, T: int, pool_dtype: torch.dtype, v_first: bool, copy: float) -> dict[str, Any]:
    H, K, V = HV, 128, 128
    q, k, v = (torch.randn(B, T, HV, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    beta, g = torch.rand(B, T, HV, device="cuda"), -torch.rand(B, T, HV, device="cuda")
    pool = torch.randn(B, H, K, V, device="cuda").to(pool_dtype)

    def step() -> object:
        return delta_rule_step(q, k, v, beta, g, state=pool, use_qk_l2norm=True, state_v_first=v_first)

    ms = time_ms(step, budget_ms=100)
    state_bytes = 2 * pool.numel() * pool.element_size()
    moved = state_bytes + (4 * q.numel() + 4 * beta.numel()) * 2
    layout = "VK" if v_first else "KV"
    dtype = str(pool_dtype).removeprefix("torch.")
    return {
        "case": f"delta {B * HV} heads, {T} tokens, {dtype}, {layout}",
        "fwd_ms": ms,
        "B*HV": B * HV,
        "T": T,
        "pool": dtype,
        "layout": layout,
        "GB/s": moved / ms / 1e6,
        "of copy": moved / ms / 1e6 / copy,
        "of same-size copy": moved / ms / 1e6 / copy_gb_per_s(state_bytes),
        "host us": host_us(step),
    }


def lla_row(B: int, H: int, Hk: int, n: int, d: int, copy: float) -> dict[str, Any]:
    """SDPA, softmax attention over the same cache, reads the same bytes."""
    q = torch.randn(B, 1, H, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, n, Hk, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lam = torch.tensor(1.0, device="cuda")
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]

    def step() -> object:
        return local_linear_attention_step(q, k, v, lam=lam)

    ms = time_ms(step, budget_ms=100)
    softmax = time_ms(lambda: scaled_dot_product_attention(*heads_first, enable_gqa=H != Hk))
    moved = 2 * k.numel() * 2
    roof = moved / copy / 1e6
    return {
        "case": f"lla B{B} H{H}/{Hk} n{n} d{d}",
        "fwd_ms": ms,
        "sdpa_fwd_ms": softmax,
        "B": B,
        "H": f"{H}/{Hk}",
        "n": n,
        "d": d,
        "GB/s": moved / ms / 1e6,
        "times roof": ms / roof,
        "times SDPA": ms / softmax,
        "host us": host_us(step),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)


def run(rows: list[dict[str, Any]], row: Callable[[], dict[str, Any]]) -> None:
    rows.append(row())
    torch.cuda.empty_cache()


def main(store: bool = False, commit: str = "", quick: bool = False) -> None:
    print(header())
    copy = copy_gb_per_s(4 << 30)
    print(f"copy of 2 GiB: {copy:.0f} GB/s")
    delta: list[dict[str, Any]] = []
    batches = (16, 128) if quick else (1, 4, 16, 32, 64, 128)
    for B, (pool, v_first) in product(batches, product((torch.float32, torch.bfloat16), (False, True))):
        run(delta, lambda B=B, p=pool, f=v_first: delta_row(B, 32, 1, p, f, copy))
    for T in (2, 4, 8):
        run(delta, lambda T=T: delta_row(32, 32, T, torch.float32, True, copy))
    show("delta_rule_step, K = V = 128, HV = 32", delta)
    lla: list[dict[str, Any]] = []
    shapes = [(1, 32, 32, 4096, 64), (8, 32, 32, 4096, 64), (32, 32, 32, 4096, 64), (64, 32, 32, 1024, 64)]
    if not quick:
        shapes += [
            (1, 32, 32, 32768, 64),
            (8, 32, 32, 4096, 128),
            (16, 32, 32, 4096, 32),
            (8, 32, 8, 8192, 64),
        ]
    for shape in shapes:
        run(lla, lambda s=shape: lla_row(*s, copy))
    show("local_linear_attention_step, one query", lla)
    if store:
        print(save("decode", delta + lla, commit or None))


if __name__ == "__main__":
    typer.run(main)
