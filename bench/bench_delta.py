"""The delta rule beside flash-linear-attention (where it is installed), measured in one run.

python bench/bench_delta.py [--only TEXT] [--store] [--with-peer] [--backward]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import typer
from nearfield import delta_rule
from rich.console import Console
from rich.table import Table
from timing import header, save, time_ms
from torch import Tensor
from torch.nn.functional import normalize

BYTES_PER_MS = 3.0e9  # a large copy on an H100
DIM = 128


@dataclass(frozen=True)
class Case:
    kind: str  # DeltaNet, GDN or KDA
    batch: int
    heads: int
    tokens: int
    target: float = 0.0  # milliseconds, forward
    target_both: float = 0.0  # forward and backward
    decay: float = 0.1  # gates are uniform in [-decay, 0]

    @property
    def name(self) -> str:
        gates = " g=0" if self.decay == 0 else ""
        return f"{self.kind}{gates} B{self.batch} H{self.heads} T{self.tokens}"

    @property
    def floor_ms(self) -> float:
        """Every input and output moved once."""
        per_token_head = 4 * DIM * 2 + 4 + {"DeltaNet": 0, "GDN": 4, "KDA": 4 * DIM}[self.kind]
        return self.batch * self.heads * self.tokens * per_token_head / BYTES_PER_MS


CASES = [
    Case("DeltaNet", 1, 16, 8192, 0.17, 0.75),
    Case("DeltaNet", 1, 32, 32768, 0.62, 2.4),
    Case("DeltaNet", 4, 16, 4096, 0.18, 0.75),
    Case("GDN", 1, 16, 8192, 0.17, 0.75),
    Case("GDN", 1, 16, 8192, 0.17, 0.75, decay=0.0),
    Case("GDN", 1, 32, 32768, 0.62, 2.4),
    Case("GDN", 1, 32, 32768, 0.62, 2.4, decay=0.0),
    Case("GDN", 4, 16, 4096, 0.18, 0.75),
    Case("GDN", 8, 16, 8192),
    Case("GDN", 1, 4, 65536),
    Case("KDA", 1, 16, 8192, 0.30),
    Case("KDA", 4, 16, 4096, 0.35),
]


def inputs(case: Case) -> dict[str, Tensor]:
    shape = (case.batch, case.tokens, case.heads)
    q, k, v = (torch.randn(*shape, DIM, device="cuda") for _ in range(3))
    args = {"q": normalize(q, dim=-1).bfloat16(), "k": normalize(k, dim=-1).bfloat16(), "v": v.bfloat16()}
    args["beta"] = torch.rand(*shape, device="cuda")
    if case.kind != "DeltaNet":
        per_channel = (DIM,) if case.kind == "KDA" else ()
        args["g"] = -case.decay * torch.rand(*shape, *per_channel, device="cuda")
    return args


def peer(case: Case, args: dict[str, Tensor]) -> Callable[[], object]:
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    if case.kind == "DeltaNet":
        return lambda: chunk_delta_rule(args["q"], args["k"], args["v"], args["beta"].bfloat16())
    function = chunk_kda if case.kind == "KDA" else chunk_gated_delta_rule
    return lambda: function(args["q"], args["k"], args["v"], g=args["g"], beta=args["beta"])


def forward_and_backward(
    run: Callable[[], object], leaves: list[Tensor], d_o: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run()[0], leaves, d_o)  # type: ignore[index]


def bench(case: Case, with_peer: bool, backward: bool) -> dict[str, object]:
    args = inputs(case)
    ms = time_ms(lambda: delta_rule(**args), budget_ms=100)
    row: dict[str, object] = {
        "case": case.name,
        "fwd_ms": ms,
        "target_ms": case.target,
        "ns_per_token_head": 1e6 * ms / (case.batch * case.heads * case.tokens),
        "floor_ratio": ms / case.floor_ms,
    }
    if with_peer:
        run = peer(case, args)
        with torch.no_grad():
            o, other = delta_rule(**args)[0].float(), run()[0].float()  # type: ignore[index]
        row["difference"] = float((o - other).norm() / o.norm())
        row["fla_fwd_ms"] = time_ms(run, budget_ms=50)
        row["speedup"] = row["fla_fwd_ms"] / ms  # type: ignore[operator]
    if backward:
        leaves = [t.requires_grad_() for t in args.values()]
        d_o = torch.randn_like(args["v"])
        both = time_ms(forward_and_backward(lambda: delta_rule(**args), leaves, d_o), budget_ms=100)
        row |= {"fwd_bwd_ms": both, "target_fwd_bwd_ms": case.target_both}
        if with_peer:
            row["fla_fwd_bwd_ms"] = time_ms(forward_and_backward(peer(case, args), leaves, d_o), budget_ms=50)
            row["speedup_fwd_bwd"] = row["fla_fwd_bwd_ms"] / both  # type: ignore[operator]
    return row


def show(rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = Table(*columns)
    for row in rows:
        cells = (row.get(c, "") for c in columns)
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=160).print(table)


def main(
    only: str = "", store: bool = False, with_peer: bool = False, backward: bool = False, commit: str = ""
) -> None:
    print(header())
    rows = []
    for case in CASES:
        if only in case.name:
            rows.append(bench(case, with_peer, backward))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    show(rows)
    if store:
        print(save("delta", rows, commit or None))


if __name__ == "__main__":
    typer.run(main)
