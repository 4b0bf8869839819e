"""The portable kernels, forced on a GPU that has faster ones: beside flash-linear-attention, PyTorch's FlashAttention-2 and
local linear attention through ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import replace

from nearfield.bench import delta, gna
from nearfield.bench.case import Case, Group
from nearfield.bench.delta import DeltaCase
from nearfield.bench.gna import GnaCase
from nearfield.bench.lla import LlaCase

ATTENTION = ("FLUX s16", "1-D w1024", "Dense T8192", "Dense T8192 causal", "Dense D64")
LOCAL_LINEAR = ((2048, 8, 64), (4096, 8, 64), (2048, 8, 128), (4096, 8, 128))

DELTA: list[DeltaCase] = [
    case for case in delta.GROUP.cases if isinstance(case, DeltaCase) and case.decay and case.targets
]
GNA: list[GnaCase] = [
    case for case in gna.GROUP.cases if isinstance(case, GnaCase) and case.name in ATTENTION
]
CASES: list[Case] = [
    *(replace(case, backend="portable", targets={}) for case in GNA),
    *(LlaCase(*shape, backend="portable") for shape in LOCAL_LINEAR),
    *(replace(case, backend="portable", targets={}) for case in DELTA),
]

GROUP = Group(
    "portable",
    "Portable kernels",
    CASES,
    # A CPU has one path.
    [
        DeltaCase("GDN", 1, 1, 130, 32),
        GnaCase("2-D, smallest", (20, 20), 1, 32, (5, 5)),
        LlaCase(96, 1, 32),
    ],
    ("fwd",),
    rank=5,
)
