"""The demo's own arithmetic, on small inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

for needed in ("matplotlib", "rich", "skimage", "sklearn", "typer"):
    pytest.importorskip(needed)

from nearfield.demo import denoise, recall, regression  # noqa: E402
from nearfield.demo.places import CPU  # noqa: E402
from nearfield.demo.report import Result, Row, write_report  # noqa: E402


def direct_non_local_means(noisy: Tensor) -> Tensor:
    """One pixel at a time, in float64: weights from distances, the pixel's own from the expected distance."""
    patch = denoise.patches(noisy)
    f, noise = denoise.features(patch)
    h2 = (denoise.BANDWIDTH * denoise.SIGMA) ** 2
    height, width, _ = patch.shape
    out = torch.empty_like(patch)

    def window(i: int, length: int) -> slice:
        start = min(max(i - denoise.WINDOW // 2, 0), length - denoise.WINDOW)
        return slice(start, start + denoise.WINDOW)

    for y in range(height):
        for x in range(width):
            near = window(y, height), window(x, width)
            distance = (f[near] - f[y, x]).double().square().sum(-1)
            distance[y - near[0].start, x - near[1].start] = noise
            weight = torch.softmax(-distance.flatten() / h2, 0)
            out[y, x] = (weight[:, None] * patch[near].flatten(0, 1)).sum(0)
    return denoise.overlap_mean(out).clamp(0, 1)


def test_non_local_means_is_what_its_name_says() -> None:
    rows, columns = torch.arange(20) / 20, torch.arange(24) / 24
    clean = torch.stack(
        [rows[:, None].expand(20, 24), columns.expand(20, 24), (rows[:, None] > 0.5) * columns], -1
    )
    noisy = clean + denoise.SIGMA * torch.randn(clean.shape)
    got = denoise.non_local_means(noisy, CPU)
    torch.testing.assert_close(got, direct_non_local_means(noisy), rtol=0, atol=1e-4)
    assert denoise.psnr(got, clean) > denoise.psnr(noisy, clean) + 3


def test_recall_asks_for_what_was_told() -> None:
    tokens, answers = recall.sample(8, torch.Generator().manual_seed(0))
    told, asked = tokens[:, : 2 * recall.PAIRS].unflatten(1, (recall.PAIRS, 2)), tokens[:, 2 * recall.PAIRS :]
    for pairs, queries, expected in zip(told.tolist(), asked.tolist(), answers.tolist(), strict=True):
        assert [dict(pairs)[query] for query in queries] == expected
        assert len(dict(pairs)) == recall.PAIRS


def test_local_linear_attention_follows_the_drift() -> None:
    world = regression.draw([100])
    late = slice(3 * regression.LENGTH // 2, 2 * regression.LENGTH)
    fitted = regression.errors(world, regression.local_linear(world, CPU, 32.0, 1e-4))[late].mean()
    averaged = regression.errors(world, regression.softmax(world, CPU, 32.0))[late].mean()
    assert fitted < averaged / 10


def test_the_report_carries_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    rows = [Row("task", "a < b", "1.0", 0.5, "CPU", ours=True)]
    text = write_report(tmp_path, [Result("Title", "Text.", rows, ["a.png"])]).read_text()
    assert "data:image/png;base64,cGljdHVyZQ==" in text
    assert "a &lt; b" in text
