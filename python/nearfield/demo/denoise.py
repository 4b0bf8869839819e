"""Non-local means as neighborhood attention: a pixel becomes the mean of the pixels around it that look alike.

The weight of pixel y for pixel x is exp(-|f_x - f_y|^2 / h^2), with f the colours of a small patch around the pixel.
Expanded, the exponent is 2 f_x.f_y - |f_y|^2 plus a term without y, which the softmax cancels: an ordinary scalar
product once the keys carry |f_y|^2 in one more channel. The values are patches too: every pixel is then the mean of
the patches that cover it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from skimage.restoration import denoise_nl_means
from sklearn.datasets import load_sample_image
from torch import Tensor

from nearfield import neighborhood_attention
from nearfield.demo.places import CPU, Place, choose, wait
from nearfield.demo.report import ACCENT, Result, Row, save_figure, styled_figure

SIGMA = 25 / 255  # of the noise, on colours in [0, 1]
RADIUS = 1  # patches are 3 x 3 pixels
WINDOW = 15
BANDWIDTH = 2.0  # h in units of SIGMA
HEAD_DIM = 32  # 27 patch colours and the extra channel, filled up with zeros

# scikit-image is shown with the best of these: a baseline should be at its best.
PEER_PATCHES = ((3, 7), (5, 6), (5, 7))  # patch size, patch distance (7: the same 15 x 15 search window)
PEER_BANDWIDTHS = (0.4, 0.5, 0.6, 0.7)


def patches(image: Tensor) -> Tensor:
    """[H, W, 3] -> [H, W, 27]: the colours around each pixel."""
    padded = F.pad(image.permute(2, 0, 1)[None], (RADIUS,) * 4, mode="reflect")
    return F.unfold(padded, 2 * RADIUS + 1)[0].T.reshape(*image.shape[:2], -1)


def overlap_mean(patch: Tensor) -> Tensor:
    """[H, W, 27] -> [H, W, 3]: every pixel is the mean over the patches that hold it."""
    height, width, _ = patch.shape
    size = (height + 2 * RADIUS, width + 2 * RADIUS)
    columns = patch.reshape(height * width, -1).T[None]
    total = F.fold(torch.stack([columns, torch.ones_like(columns)], 1)[0], size, 2 * RADIUS + 1)
    total = total[:, :, RADIUS:-RADIUS, RADIUS:-RADIUS]
    return (total[0] / total[1]).permute(1, 2, 0)


def features(patch: Tensor) -> tuple[Tensor, float]:
    """Principal components of the patches, each shrunk by its signal's share of the variance (Wiener's gain).

    Also returns how far apart two noisy copies of the same patch are on average, squared.
    """
    centred = (patch - patch.mean((0, 1))).flatten(0, 1)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    gain = (variances - SIGMA**2).clamp_min(0) / variances
    return (centred @ (axes * gain)).reshape(patch.shape), 2 * SIGMA**2 * float(gain.square().sum())


def non_local_means(noisy: Tensor, place: Place) -> Tensor:
    """[H, W, 3] -> [H, W, 3]."""
    patch = patches(noisy.to(place.device))
    f, noise = features(patch)
    square = f.square().sum(-1, keepdim=True)
    fill = f.new_zeros(*f.shape[:2], HEAD_DIM - f.shape[2] - 1)
    q = torch.cat([f, torch.ones_like(square), fill], -1)
    k = torch.cat([2 * f, -square, fill], -1)
    v = F.pad(patch, (0, HEAD_DIM - patch.shape[2]))
    q, k, v = (x[None, :, :, None].to(place.dtype) for x in (q, k, v))
    h2 = (BANDWIDTH * SIGMA) ** 2
    out, lse = neighborhood_attention(q, k, v, WINDOW, scale=1 / h2, return_lse=True)
    out = out[0, :, :, 0, : patch.shape[2]].float()
    # A pixel is at distance 0 from itself, noise included, and would outweigh all others. Give it the weight of a
    # noisy copy of itself instead; its share of the sum is known from lse.
    share = torch.exp(square / h2 - lse[0, :, :, 0, None]).clamp(max=1)
    wanted = share * math.exp(-noise / h2)
    out = (out + (wanted - share) * patch) / (1 - share + wanted)
    return overlap_mean(out).clamp(0, 1).cpu()


def psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * math.log10(float((image.clamp(0, 1) - clean).square().mean()))


class Run(NamedTuple):
    psnr: float
    seconds: float
    image: Tensor


def timed(clean: Tensor, place: Place, method: Callable[[], Tensor]) -> Run:
    """The middle of three runs; the first call pays for warming up."""
    image, seconds = method(), []
    for _ in range(3):
        wait(place)
        started = time.perf_counter()
        method()
        wait(place)
        seconds.append(time.perf_counter() - started)
    return Run(psnr(image, clean), sorted(seconds)[1], image)


def peer(noisy: Tensor, size: int, distance: int, bandwidth: float) -> Tensor:
    """scikit-image's non-local means."""
    array = denoise_nl_means(
        noisy.numpy(), patch_size=size, patch_distance=distance, h=bandwidth * SIGMA, sigma=SIGMA, fast_mode=True,
        channel_axis=-1,
    )  # fmt: skip
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def best_peer(noisy: Tensor, clean: Tensor) -> Run:
    """With the settings that suit this picture best."""
    settings = [(*patch, bandwidth) for patch in PEER_PATCHES for bandwidth in PEER_BANDWIDTHS]
    best = max(settings, key=lambda setting: psnr(peer(noisy, *setting), clean))
    return timed(clean, CPU, lambda: peer(noisy, *best))


def attempt(place: Place) -> None:
    x = torch.zeros(1, WINDOW, WINDOW, 1, HEAD_DIM, device=place.device, dtype=place.dtype)
    neighborhood_attention(x, x, x, WINDOW, return_lse=True)


PICTURES = {"china.jpg": (slice(225, 325), slice(285, 435)), "flower.jpg": (slice(120, 220), slice(250, 400))}


def run(out: Path, progress: Progress, use_gpu: bool) -> Result:
    # |f|^2 stands in a channel of its own, for which bfloat16 is too coarse.
    place = choose(attempt, (torch.float32, torch.float16), use_gpu)
    task = progress.add_task(f"Denoising photographs ({place})", total=2 * len(PICTURES))
    rows, shown = [], []
    for name, crop in PICTURES.items():
        clean = torch.from_numpy(load_sample_image(name).astype(np.float32) / 255)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = clean + SIGMA * noise
        ours = timed(clean, place, partial(non_local_means, noisy, place))
        progress.advance(task)
        theirs = best_peer(noisy, clean)
        progress.advance(task)
        label = f"denoise {name}"
        rows += [
            Row(label, "noisy photograph", f"{psnr(noisy, clean):.2f} dB", 0.0, ""),
            Row(label, "scikit-image non-local means", f"{theirs.psnr:.2f} dB", theirs.seconds, "CPU"),
            Row(label, "neighborhood attention", f"{ours.psnr:.2f} dB", ours.seconds, str(place), ours=True),
        ]
        for kind, image in (("noisy", noisy), ("ours", ours.image)):
            array = (image.clamp(0, 1) * 255).round().byte().numpy()
            matplotlib.image.imsave(out / f"{Path(name).stem}-{kind}.png", array)
        images = {
            "noisy": noisy,
            "scikit-image": theirs.image,
            "neighborhood attention": ours.image,
            "original": clean,
        }
        shown.append(
            [
                (title, image[crop].clamp(0, 1).numpy(), None if title == "original" else psnr(image, clean))
                for title, image in images.items()
            ]
        )
    figure, axes = styled_figure(len(shown), 4, 12, 2.35 * len(shown) + 0.3)
    for axes_row, cells in zip(axes, shown, strict=True):
        for axis, (title, pixels, quality) in zip(axes_row, cells, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_axis_off()
            ours_here = title == "neighborhood attention"
            caption = title if quality is None else f"{title}   {quality:.2f} dB"
            axis.set_title(
                caption, color=ACCENT if ours_here else "black", weight="bold" if ours_here else "normal"
            )
    save_figure(figure, out / "denoise.png")
    text = (
        f"Non-local means over a window of {WINDOW} x {WINDOW} pixels, written as 2-D neighborhood attention on "
        f"patches; noise of {SIGMA * 255:.0f}/255, quality as PSNR of the whole picture. One fixed setting for us; "
        f"scikit-image is shown with the best of {len(PEER_PATCHES) * len(PEER_BANDWIDTHS)} settings for each picture."
    )
    return Result("Denoising photographs", text, rows, ["denoise.png"])
