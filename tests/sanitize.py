"""Neighborhood attention's kernels under compute-sanitizer, forward and backward, both backends.

python tests/sanitize.py [memcheck synccheck ...]

racecheck does not follow how the Hopper kernels hand buffers over, the arrival of one lane on a barrier in shared memory
after __syncwarp(), and reports every such buffer; for races there are the bitwise tests in test_gna_gpu.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gna_cases import Case

TOOLS = ["memcheck"]
# Every layout of a block (32 to 256 features), masks, partial boxes, gathered rows, groups of heads; the first three
# have more tiles than an H100 has multiprocessors, so that buffers go round across tiles.
CASES = [
    Case((300,), (70,), dim=128, heads=8, batch=8, label="many-tiles"),
    Case((300,), (170,), dim=64, heads=8, batch=8, label="many-tiles-64"),
    Case((300,), (170,), dim=256, heads=8, batch=8, label="many-tiles-256"),
    Case((15, 17), (7, 6), (2, 1), (1, 2), dim=64, heads=4, heads_kv=2, label="gqa-dilated"),
    Case((7, 9, 8), (3, 5, 4), causal=(True, False, False), additional=37, dim=128, heads=2, label="video"),
    Case((18, 16), (9, 8), dim=256, heads=2, label="256"),
    Case((20, 21), (5, 7), dim=32, heads=2, batch=2, label="32"),
    Case((18, 17), (5, 9), (1, 3), dim=64, heads=4, heads_kv=2, batch=2, biased=True, label="bias"),
    Case((11, 13), (4, 5), dim=72, dim_v=40, heads=2, additional=3, label="padded-features"),
]


def run_cases() -> None:
    for backend in ("hopper", "portable") if torch.cuda.get_device_capability() == (9, 0) else ("portable",):
        for dtype in (torch.bfloat16, torch.float32) if backend == "portable" else (torch.bfloat16,):
            for case in CASES:
                inputs = [t.detach().cuda().requires_grad_() for t in case.inputs(dtype)]
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    out, _ = case.run(inputs, backend)
                    torch.autograd.grad(out, inputs, torch.ones_like(out))
    torch.cuda.synchronize()
    print("all cases ran")


def sanitize(tool: str, program: str) -> int:
    """Runs this file under a tool; 0 if it found nothing."""
    # Each tensor is an allocation of its own, so that an access beyond it is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--kernel-regex", "kns=nearfield", "--error-exitcode", "9", "--print-limit", "10"]
    command = [program, "--tool", tool, *options, sys.executable, __file__, "--inside"]
    print(f"== {tool}", flush=True)
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", default=TOOLS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return run_cases()
    program = shutil.which("compute-sanitizer") or str(
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/compute-sanitizer")
    )
    if not Path(program).exists():
        sys.exit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    failed = [tool for tool in args.tools if sanitize(tool, program) != 0]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
