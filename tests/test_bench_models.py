"""The end-to-end bench runs scaled down without a GPU, says so, and counts what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import models  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the bench runs at full size")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "models.py"), "--blocks", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_without_a_gpu_is_flagged_and_complete(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    assert "SCALED DOWN" in done.stdout
    result: dict[str, Any] = json.loads((tmp_path / "rows.json").read_text())
    assert result["scaled_down"] is True
    rows = result["rows"]
    assert [row["model"] for row in rows] == [c.name for c in (*models.TRANSFORMERS, *models.LANGUAGE_MODELS)]
    for row in rows[: len(models.TRANSFORMERS)]:
        assert row["speedup"] == pytest.approx(row["dense ms"] / row["near ms"])
        assert 0 < row["dense attention share"] <= 1
    for row in rows[len(models.TRANSFORMERS) :]:
        for what in ("train", "decode"):
            assert row[f"{what} speedup"] == pytest.approx(
                row[f"softmax {what} ms"] / row[f"deltanet {what} ms"]
            )


@pytest.mark.parametrize("arguments,text", [(["--only", "nonsense"], "nonsense"), (["--store"], "GPU")])
def test_bad_input_is_one_sentence(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_with_the_window_of_the_whole_grid_both_blocks_agree() -> None:
    case = models.Transformer("", (4, 6), 2, 8, (4, 6), (1, 1))
    torch.manual_seed(0)
    block = models.Block(case, models.dense).double()
    x = torch.randn(1, 4, 6, 16).double()
    expected = block(x)
    block.attend = lambda q, k, v: models.neighborhood_attention(q, k, v, case.window)
    torch.testing.assert_close(block(x), expected)


def test_softmax_layer_sees_all_of_the_past() -> None:
    ours = models.SlidingWindowAttention(16, 2, 20).double()
    peer = models.SoftmaxAttention(16, 2, 20).double()
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(1, 9, 16).double()
    torch.testing.assert_close(peer(x), ours(x))
