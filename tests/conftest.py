"""Shared fixtures: uninitialised memory is NaN, random numbers are repeatable, gpu tests need a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("nearfield", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("nearfield")

# Their asserts say what they compared, as those of test modules do.
pytest.register_assert_rewrite("delta_cases", "gna_cases", "gna_fp8_cases", "lla_cases")


if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Threads of several processes on the same cores wait for each other in busy loops.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20260101)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty hands out NaN, so an output element that a kernel does not write fails its comparison.

    On CPU torch does this itself in deterministic mode. On CUDA that mode would also choose our deterministic
    kernels, so there the caching allocator's free blocks are filled with NaN instead.
    """
    if torch.cuda.is_available():
        blocks = [
            torch.full((n,), float("nan"), device="cuda")
            for n in (1 << 8, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
        ]
        del blocks
        yield
        if workers and torch.cuda.memory_reserved() > 1 << 30:  # what one worker keeps, the others lack
            torch.cuda.empty_cache()
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
