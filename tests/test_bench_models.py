"""The end-to-end bench runs scaled down without a GPU, says so, and counts what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nearfield.bench import report

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import models  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the bench runs at full size")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "models.py"), "--blocks", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_run_without_a_gpu_is_flagged_and_complete(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"), "--commit", "abc")
    assert done.returncode == 0, done.stderr
    assert "SCALED DOWN" in done.stdout
    names = [f"cpu-models.{suffix}" for suffix in ("json", "md", "png")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    result = report.load(tmp_path / "out" / "cpu-models.json")
    assert (result["scaled_down"], result["commit"], result["group"]) == (True, "abc", "models")
    rows = result["rows"]
    steps = [f"{c.name}, {what}" for c in models.LANGUAGE_MODELS for what in ("training step", "next token")]
    assert [row["case"] for row in rows] == [*(c.name for c in models.TRANSFORMERS), *steps]
    for row in rows:
        ours, peer = (
            row[next(key for key in row if re.fullmatch(rf"{who}fwd(bwd)?_ms", key))] for who in ("", "sdpa_")
        )
        assert row["speedup"] == pytest.approx(peer / ours)
    for row in rows[: len(models.TRANSFORMERS)]:
        assert 0 < row["attention_share"] <= 1
        assert f"| {row['attention_share']:.0%} |" in done.stdout
    # What a window does not change is measured once.
    assert rows[0]["sdpa_fwd_ms"] == rows[1]["sdpa_fwd_ms"] != rows[2]["sdpa_fwd_ms"]


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--only", "nonsense"], "nonsense"),
        (["--store"], "GPU"),
        (["--blocks", "0"], "greater than or equal to 1"),
        (["--out", str(BENCH / "models.py")], "a folder is expected"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert text in " ".join(done.stderr.replace("│", " ").split())
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
