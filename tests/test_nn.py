"""The layers learn, and decoding token by token gives what the whole sequence gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nearfield.gna import neighborhood_attention_reference
from nearfield.gna.reference import neighborhood_mask, visible_keys
from nearfield.lla import reference as lla_reference
from nearfield.nn import (
    DeltaNet,
    GatedDeltaNet,
    HiLoAttention,
    HybridBlock,
    InwardWindowAttention,
    LocalLinearAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodLocalLinearAttention1D,
    NeighborhoodLocalLinearAttention2D,
    NeighborhoodLocalLinearAttention3D,
    RingCache,
    ShortConvolution,
    SlidingWindowAttention,
    rotary,
)
from torch import Tensor, nn
from torch.nn import functional as F

DIM = 24
LINE, IMAGE, VIDEO = (12,), (6, 7), (3, 5, 6)

Make = Callable[[], nn.Module]

GRID_LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "na1d": (lambda: NeighborhoodAttention1D(DIM, 4, 5), LINE),
    "na1d-causal-dilated": (lambda: NeighborhoodAttention1D(DIM, 4, 4, dilation=2, is_causal=True), LINE),
    "na2d-gqa": (lambda: NeighborhoodAttention2D(DIM, 4, (3, 5), stride=(1, 2), num_kv_heads=2), IMAGE),
    "na2d-rotary": (lambda: NeighborhoodAttention2D(DIM, 2, 3, use_rotary=True, qk_norm=True), IMAGE),
    "na3d-video": (
        lambda: NeighborhoodAttention3D(DIM, 2, (-1, 3, 3), is_causal=(True, False, False), head_dim=8),
        VIDEO,
    ),
    "hilo-1d": (lambda: HiLoAttention(DIM, 4, (3,), 4), LINE),
    "hilo-2d": (lambda: HiLoAttention(DIM, 4, (3, 3), (2, 4), num_kv_heads=2), IMAGE),
    "hilo-3d": (lambda: HiLoAttention(DIM, 4, (3, 3, 3), 2, qk_norm=True), VIDEO),
    "nlla1d-causal-dilated": (
        lambda: NeighborhoodLocalLinearAttention1D(DIM, 4, 4, dilation=2, is_causal=True),
        LINE,
    ),
    "nlla2d-gqa": (
        lambda: NeighborhoodLocalLinearAttention2D(DIM, 4, (3, 5), stride=(1, 2), num_kv_heads=2),
        IMAGE,
    ),
    "nlla2d-rotary": (
        lambda: NeighborhoodLocalLinearAttention2D(DIM, 2, 3, use_rotary=True, qk_norm=False, bias=True),
        IMAGE,
    ),
    "nlla3d-video": (
        lambda: NeighborhoodLocalLinearAttention3D(
            DIM, 2, (-1, 3, 3), is_causal=(True, False, False), head_dim=8
        ),
        VIDEO,
    ),
    "inward-small": (lambda: InwardWindowAttention(DIM, 2, (8, 8)), IMAGE),
    "inward-large": (lambda: InwardWindowAttention(DIM, 2, (4, 4), stride=2), IMAGE),
}

DECODERS: dict[str, Make] = {
    "deltanet": lambda: DeltaNet(DIM, 2),
    "deltanet-gva-gate": lambda: DeltaNet(
        DIM, 2, num_v_heads=4, head_v_dim=6, use_output_gate=True, allow_neg_eigval=True
    ),
    "deltanet-no-conv": lambda: DeltaNet(DIM, 3, head_dim=8, conv_size=1),
    "gdn": lambda: GatedDeltaNet(DIM, 2, head_dim=8),
    "gdn-gva": lambda: GatedDeltaNet(DIM, 1, head_dim=8, num_v_heads=3, head_v_dim=8, use_output_gate=False),
    "window": lambda: SlidingWindowAttention(DIM, 4, 6, num_kv_heads=2),
    "window-qknorm": lambda: SlidingWindowAttention(DIM, 2, 4, qk_norm=True, rotary_base=None),
    "window-1": lambda: SlidingWindowAttention(DIM, 2, 1),
    "hybrid": lambda: HybridBlock(DIM, 2, 5, num_kv_heads=1, num_v_heads=4, head_v_dim=4),
    # Conjugate gradients to the end, so that they agree with the direct solver of decoding.
    "lla": lambda: LocalLinearAttention(DIM, 4, num_kv_heads=2, tol=1e-14, max_iters=200),
    "lla-window": lambda: LocalLinearAttention(DIM, 2, window=7, lam=0.1, tol=1e-14, max_iters=200),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(layer: nn.Module, x: Tensor, target: Tensor, steps: int = 60, rate: float = 2e-2) -> list[float]:
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layer(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def loss_of_the_blind(x: Tensor, target: Tensor) -> float:
    """What remains of the target after the best linear map of each token alone."""
    tokens, wanted = x.flatten(0, -2), target.flatten(0, -2)
    return F.mse_loss(tokens @ torch.linalg.lstsq(tokens, wanted).solution, wanted).item()


def new_cache(layer: Any, batch: int, capacity: int) -> Any:
    return (
        layer.new_cache(batch, capacity)
        if isinstance(layer, LocalLinearAttention)
        else layer.new_cache(batch)
    )


def every_parameter_moves(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x).square().sum().backward()
    still = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still


@pytest.mark.parametrize("name", [*GRID_LAYERS])
def test_grid_layers_learn_from_their_surroundings(name: str) -> None:
    make, size = GRID_LAYERS[name]
    layer, x = make(), torch.randn(8, *size, DIM)
    target = x.roll(1, -2)  # what the neighbour is
    losses = train(layer, x, target)
    assert losses[-1] < losses[0]
    assert losses[-1] < 0.9 * loss_of_the_blind(x, target)
    every_parameter_moves(layer, x)


@pytest.mark.parametrize("name", [*DECODERS])
def test_sequence_layers_learn_from_the_past(name: str) -> None:
    layer, x = DECODERS[name](), torch.randn(8, 20, DIM)
    target = x.roll(1, 1)
    losses = train(layer, x, target)
    assert losses[-1] < losses[0]
    if name == "window-1":  # its queries see one key, whose weight is 1
        assert losses[-1] > 0.9 * loss_of_the_blind(x, target)
        return
    assert losses[-1] < 0.9 * loss_of_the_blind(x, target)
    every_parameter_moves(layer, x)


@pytest.mark.parametrize("chunks", [[1] * 19, [9, *[1] * 10], [7, 12], [3, 1, 9, 2, 4]], ids=str)
@pytest.mark.parametrize("name", [*DECODERS])
def test_decoding_equals_the_whole_sequence(name: str, chunks: list[int]) -> None:
    layer = DECODERS[name]().double()
    x = torch.randn(3, sum(chunks), DIM, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        cache = new_cache(layer, 3, x.shape[1])
        parts = [layer(part, cache) for part in x.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10 * float(whole.abs().max()))


@pytest.mark.parametrize("name", [name for name in DECODERS if not name.startswith("lla")])
def test_going_on_with_gradients_equals_the_whole_sequence(name: str) -> None:
    layer = DECODERS[name]().double()
    x = torch.randn(2, 17, DIM, dtype=torch.float64, requires_grad=True)
    cache = new_cache(layer, 2, 17)
    parts = [layer(part, cache) for part in x.split([8, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad(parts[-1].sum(), x)  # the caches cut the gradient, but do not break it
    assert (grad[:, :9] == 0).all()
    assert (grad[:, 9:] != 0).any()


@pytest.mark.parametrize("name", ["deltanet", "gdn-gva", "window", "hybrid"])
def test_decoding_needs_constant_memory(name: str) -> None:
    layer = DECODERS[name]()
    cache = layer.new_cache(1)  # type: ignore[operator]

    def sizes(value: object) -> list[tuple[int, ...]]:
        if isinstance(value, Tensor):
            return [(value.shape, value.untyped_storage().nbytes())]  # type: ignore[list-item]
        return [s for part in vars(value).values() if not isinstance(part, int) for s in sizes(part)]

    seen = []
    with torch.no_grad():
        for _ in range(40):
            layer(torch.randn(1, 1, DIM), cache)
            seen.append(sizes(cache))
    assert len(seen[0]) >= 2
    assert all(s == seen[8] for s in seen[8:])


def test_an_uneven_batch_of_streams_is_independent() -> None:
    layer = HybridBlock(DIM, 2, 5).double()
    x = torch.randn(4, 11, DIM, dtype=torch.float64)
    with torch.no_grad():
        together, alone = layer.new_cache(4), layer.new_cache(1)
        for t in range(11):
            both = layer(x[:, t : t + 1], together)
            one = layer(x[2:3, t : t + 1], alone)
            torch.testing.assert_close(both[2:3], one, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------- neighborhood layers


def test_qkv_are_views_of_one_product() -> None:
    layer = NeighborhoodAttention2D(DIM, 4, 3, num_kv_heads=2)
    q, k, v = layer.qkv.split(torch.randn(1, 4, 4, DIM))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert [t.shape[-2] for t in (q, k, v)] == [4, 2, 2]
    assert not k.is_contiguous()


@pytest.mark.parametrize("context", [False, True])
def test_neighborhood_layer_is_the_reference_between_projections(context: bool) -> None:
    layer = NeighborhoodAttention2D(
        DIM, 4, (3, 4), dilation=(2, 1), is_causal=(False, True), num_kv_heads=2, context_dim=10
    ).double()
    assert layer.context_kv is not None
    x, text = torch.randn(2, 7, 5, DIM).double(), torch.randn(2, 3, 10).double()
    q, k, v = layer.qkv(x).unflatten(-1, (8, 6)).split([4, 2, 2], -2)
    extra = layer.context_kv(text).unflatten(-1, (4, 6)).chunk(2, -2) if context else ()
    o, _ = neighborhood_attention_reference(q, k, v, (3, 4), (1, 1), (2, 1), (False, True), 6**-0.5, *extra)
    got = layer(x, text) if context else layer(x)
    torch.testing.assert_close(got, layer.proj(o.flatten(-2)), rtol=0, atol=1e-12)


def test_neighborhood_fit_is_the_reference_between_projections() -> None:
    layer = NeighborhoodLocalLinearAttention2D(
        DIM, 4, (3, 4), dilation=(2, 1), is_causal=(False, True), num_kv_heads=2, lam=0.3, scale=0.7,
        tol=1e-14, max_iters=200,
    ).double()  # fmt: skip
    with torch.no_grad():
        layer.theta.copy_(torch.randn(4))
    x = torch.randn(2, 7, 5, DIM).double()
    q, k, v = layer.qkv(x).unflatten(-1, (8, 6)).split([4, 2, 2], -2)
    windows: dict[str, Any] = {"stride": (1, 1), "dilation": (2, 1), "is_causal": (False, True)}
    o = lla_reference.neighborhood_local_linear_attention(
        layer.q_norm(q), layer.k_norm(k), v, kernel_size=(3, 4), lam=layer.lam, scale=0.7, **windows
    )[0]
    torch.testing.assert_close(layer(x), layer.proj(o.flatten(-2)), rtol=0, atol=1e-10)


def test_a_large_ridge_makes_the_neighborhood_fit_attention() -> None:
    fit = NeighborhoodLocalLinearAttention2D(DIM, 4, (3, 5), qk_norm=False, use_rotary=True, lam=1e9).double()
    attention = NeighborhoodAttention2D(DIM, 4, (3, 5), bias=False, use_rotary=True).double()
    attention.load_state_dict({name: t for name, t in fit.state_dict().items() if name != "theta"})
    x = torch.randn(2, *IMAGE, DIM).double()
    torch.testing.assert_close(fit(x), attention(x), rtol=0, atol=1e-7)


def test_hilo_sees_the_whole_grid_blurred() -> None:
    layer = HiLoAttention(DIM, 2, (3,), 4).double()
    x = torch.randn(1, 14, DIM).double().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 0].sum(), x)
    far = grad[0, 3:]
    assert (far.abs().sum(-1) > 0).all()
    torch.testing.assert_close(far[1:4], far[1:2].expand(3, -1))  # one block of four, one gradient
    torch.testing.assert_close(
        far[9:11], far[9:10].expand(2, -1)
    )  # a partial block is averaged over what it has


@pytest.mark.parametrize("size", [(4, 4), (3, 4)])
def test_inward_window_is_full_attention_on_the_trained_grid(size: tuple[int, ...]) -> None:
    layer = InwardWindowAttention(DIM, 2, (4, 4)).double()
    x = torch.randn(2, *size, DIM).double()
    q, k, v = layer.qkv.split(x)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (rotary(q), rotary(k), v))
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, *size, -1)
    torch.testing.assert_close(layer(x), layer.proj(o), rtol=0, atol=1e-12)


def test_inward_window_keeps_the_trained_field_of_view() -> None:
    """On a larger grid each query gets what it got in training at its place inside a crop of the trained size."""
    layer = InwardWindowAttention(DIM, 2, (4, 3)).double()
    x = torch.randn(1, 6, 7, DIM).double()
    got = layer(x)
    for row in range(6):
        for column in range(7):
            rows, columns = visible_keys(row, 6, 4, 1, 1, False), visible_keys(column, 7, 3, 1, 1, False)
            crop = x[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            inside = layer(crop)[:, row - rows[0], column - columns[0]]
            torch.testing.assert_close(got[:, row, column], inside, rtol=0, atol=1e-12)


def test_sliding_window_is_masked_attention() -> None:
    layer = SlidingWindowAttention(DIM, 4, 5, num_kv_heads=2, head_dim=4).double()
    x = torch.randn(2, 13, DIM).double()
    q, k, v = layer.qkv.split(x)
    q, k, v = (t.transpose(1, 2) for t in (rotary(q), rotary(k), v))
    mask = neighborhood_mask((13,), (5,), (1,), (1,), (True,))
    o = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x), layer.proj(o), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("size,dim", [((9,), 8), ((4, 5), 10), ((3, 4, 2), 16)])
def test_rotary_depends_on_distances_only(size: tuple[int, ...], dim: int) -> None:
    q, k = torch.randn(2, 1, *size, 2, dim).double()
    first = (slice(None), *(slice(1),) * len(size))
    q, k = q[first].expand_as(q), k[first].expand_as(k)

    def products(offset: int) -> Tensor:
        a, b = (rotary(t, offset=offset).flatten(1, -3)[0, :, 0] for t in (q, k))
        return a @ b.T

    here, there = products(0), products(1234)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    torch.testing.assert_close(here.diagonal(), here[0, 0].expand(here.shape[0]), rtol=0, atol=1e-12)
    assert (here[0, 1:] - here[0, 0]).abs().min() > 1e-6  # every other place is told apart
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1))


def test_short_convolution_is_causal_and_goes_on() -> None:
    layer = ShortConvolution(3, 4).double()
    x = torch.randn(2, 9, 3).double()
    expected = torch.zeros_like(x)
    for t in range(9):
        for lag in range(min(4, t + 1)):
            expected[:, t] += layer.weight[:, 0, 3 - lag] * x[:, t - lag]
    torch.testing.assert_close(layer(x), F.silu(expected))
    state, parts = layer.new_state(2), []
    for part in x.split([2, 1, 6], 1):
        y, state = layer.extend(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))


PACKED = [name for name in DECODERS if name.startswith(("deltanet", "gdn"))]
LENGTHS = [5, 1, 0, 9, 2, 0]  # longer and shorter than a convolution; of no token


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@pytest.mark.parametrize("name", [*PACKED, "lla", "lla-window"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_do_not_see_each_other(name: str, dtype: torch.dtype) -> None:
    layer = DECODERS[name]().double()
    x = torch.randn(1, sum(LENGTHS), DIM, dtype=torch.float64, requires_grad=True)
    got = layer(x, cu_seqlens=offsets(LENGTHS, dtype))
    expected = torch.cat([layer(part) for part in x.split(LENGTHS, 1) if part.shape[1]], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(got)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        *(torch.autograd.grad(y, leaves, upstream) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * max(1.0, float(theirs.abs().max())))
    # The gradient of one sequence's outputs stays inside it.
    (grad,) = torch.autograd.grad(layer(x, cu_seqlens=offsets(LENGTHS))[:, 6:15].sum(), x)
    assert (grad[:, :6] == 0).all()
    assert (grad[:, 15:] == 0).all()


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_go_on_from_a_cache(name: str) -> None:
    """Three packed calls, then single tokens, as sequences of a batch that are not equally long."""
    layer = DECODERS[name]().double()
    rounds = [[5, 1, 3], [2, 7, 0], [0, 1, 4]]
    sequences = [torch.randn(1, sum(r[i] for r in rounds) + 1, DIM).double() for i in range(3)]
    cache, begins = layer.new_cache(3), [0, 0, 0]  # type: ignore[operator]
    outputs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for lengths in rounds:
            spans = [x[:, b : b + n] for x, b, n in zip(sequences, begins, lengths, strict=True)]
            y = layer(torch.cat(spans, 1), cache, cu_seqlens=offsets(lengths))
            for i, part in enumerate(y.split(lengths, 1)):
                outputs[i].append(part)
            begins = [b + n for b, n in zip(begins, lengths, strict=True)]
        last = layer(torch.cat([x[:, -1:] for x in sequences]), cache)
        for i, x in enumerate(sequences):
            got = torch.cat([*outputs[i], last[i : i + 1]], 1)
            torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-10)


def test_packed_layers_compile_without_graph_breaks() -> None:
    layer, x = GatedDeltaNet(DIM, 2, head_dim=8), torch.randn(1, 12, DIM)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    cu_seqlens = offsets([4, 8])
    torch.testing.assert_close(compiled(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens))


def test_packed_convolution_in_bfloat16_is_the_convolution() -> None:
    layer = ShortConvolution(8, 4).bfloat16()
    x = torch.randn(1, 60, 8).bfloat16()
    got = layer(x, offsets([20, 40]))
    expected = torch.cat([layer(part) for part in x.split([20, 40], 1)], 1)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    assert got.dtype == torch.bfloat16
    assert layer(x[:, :0], offsets([0, 0])).shape == (1, 0, 8)


@pytest.mark.parametrize("window", [1, 4, 5])
def test_ring_cache_holds_the_last_tokens_in_order(window: int) -> None:
    tokens = torch.arange(1.0, 24.0).reshape(1, -1, 1, 1)
    cache = RingCache(torch.full((1, window, 1, 1), torch.nan), torch.full((1, window, 1, 1), torch.nan))
    seen = 0
    for count in (1, 2, 4, 1, 9, 1, 5):
        cache.append(tokens[:, seen : seen + count], -tokens[:, seen : seen + count])
        seen += count
        past_k, past_v = cache.past()
        assert past_k.flatten().tolist() == list(range(max(seen - window + 1, 0) + 1, seen + 1))
        assert torch.equal(past_k, -past_v)
        filled = sorted(cache.filled()[0].flatten().tolist())
        assert filled == list(range(max(seen - window, 0) + 1, seen + 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda **ridge: LocalLinearAttention(DIM, 3, **ridge),
        lambda **ridge: NeighborhoodLocalLinearAttention2D(DIM, 3, 3, **ridge),
    ],
    ids=["sequence", "grid"],
)
def test_the_ridge_is_learned_and_stays_above_its_bound(make: Callable[..., Any]) -> None:
    layer = make(lam=0.5, lam_min=0.1)
    torch.testing.assert_close(layer.lam, torch.full((3,), 0.5))
    with torch.no_grad():
        layer.theta.fill_(-100)
    assert (layer.lam >= 0.1).all()


@pytest.mark.parametrize("kind", ["deltanet", "gdn", "hybrid", "window", "lla"])
def test_layers_run_in_bfloat16_and_under_autocast(kind: str) -> None:
    layer, x = DECODERS[kind](), torch.randn(2, 9, DIM)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - exact).abs().max() < 0.1 * exact.abs().max()
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.no_grad():
        cache = new_cache(layer, 2, 9)
        parts = [layer(part, cache) for part in x.bfloat16().split(1, 1)]
    assert (torch.cat(parts, 1).float() - exact).abs().max() < 0.1 * exact.abs().max()


GPU_LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "deltanet": (lambda: DeltaNet(64, 2), (75,)),
    "gdn": (lambda: GatedDeltaNet(64, 2, head_dim=32), (75,)),
    "window": (lambda: SlidingWindowAttention(64, 4, 9, num_kv_heads=2), (75,)),
    "hybrid": (lambda: HybridBlock(64, 2, 9), (75,)),
    "lla": (lambda: LocalLinearAttention(64, 2), (75,)),
    "na2d": (lambda: NeighborhoodAttention2D(64, 4, (3, 5), num_kv_heads=2), (9, 11)),
    "nlla2d": (lambda: NeighborhoodLocalLinearAttention2D(64, 2, (3, 5), use_rotary=True), (9, 11)),
    "hilo": (lambda: HiLoAttention(64, 4, (3, 3), 2), (9, 11)),
    "inward": (lambda: InwardWindowAttention(64, 2, (4, 4)), (9, 11)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*GPU_LAYERS])
def test_layers_on_a_gpu(name: str) -> None:
    make, size = GPU_LAYERS[name]
    layer = make().bfloat16()
    x = torch.randn(2, *size, 64).bfloat16()
    upstream = torch.randn_like(x).float()

    def run(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(), *layer.parameters()]
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]

    exact = run(copy.deepcopy(layer).float(), x.float(), upstream)
    eager = run(layer, x, upstream)  # the same kernels of PyTorch round it all the same
    layer = layer.cuda()
    on_gpu = x.detach().cuda()
    for got, plain, truth in zip(run(layer, on_gpu, upstream.cuda()), eager, exact, strict=True):
        error, yardstick = ((t.cpu().float() - truth).norm() for t in (got, plain))
        assert error <= 3 * yardstick + 2**-8 * truth.norm()
    if len(size) > 1:
        return
    with torch.no_grad():
        whole = layer(on_gpu)
        cache = new_cache(layer, 2, size[0])
        parts = [layer(part, cache) for part in on_gpu.split([64, *[1] * (size[0] - 64)], 1)]
        assert (torch.cat(parts, 1) - whole).float().norm() <= 0.03 * whole.float().norm()
        if name in ("deltanet", "gdn"):
            packed = layer(on_gpu[:1], cu_seqlens=offsets([20, 55]).cuda())
            apart = torch.cat([layer(part) for part in on_gpu[:1].split([20, 55], 1)], 1)
            assert (packed - apart).float().norm() <= 0.03 * apart.float().norm()


@pytest.mark.parametrize("kind", ["gdn", "hybrid", "window", "lla", "nlla2d-rotary"])
def test_layers_compile_without_breaks(kind: str) -> None:
    make, size = GRID_LAYERS[kind] if kind in GRID_LAYERS else (DECODERS[kind], (9,))
    layer, x = make(), torch.randn(2, *size, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "text,call",
    [
        ("dim 24 is no multiple of num_heads 5", lambda: NeighborhoodAttention1D(24, 5, 3)),
        (
            "num_heads 4 is no multiple of num_kv_heads 3",
            lambda: NeighborhoodAttention2D(24, 4, 3, num_kv_heads=3),
        ),
        ("expected \\[B, X, X, dim\\]", lambda: NeighborhoodAttention2D(24, 4, 3)(torch.randn(1, 9, 24))),
        (
            "expected \\[B, X, X, dim\\]",
            lambda: NeighborhoodLocalLinearAttention2D(24, 4, 3)(torch.randn(1, 9, 24)),
        ),
        (
            "NeighborhoodLocalLinearAttention1D: got lam 0.01 and lam_min 0.1",
            lambda: NeighborhoodLocalLinearAttention1D(24, 4, 3, lam=0.01, lam_min=0.1),
        ),
        (
            "made without context_dim",
            lambda: NeighborhoodAttention1D(24, 4, 3)(torch.randn(1, 9, 24), torch.randn(1, 2, 24)),
        ),
        ("pool_size", lambda: HiLoAttention(24, 4, (3, 3), (2, 2, 2))),
        (
            "taken by the averages",
            lambda: HiLoAttention(24, 4, (3,), 2)(torch.randn(1, 9, 24), torch.randn(1, 2, 24)),
        ),
        ("trained_size", lambda: InwardWindowAttention(24, 4, (4, 4, 4, 4))),
        ("num_v_heads 3 is no multiple of num_heads 2", lambda: DeltaNet(24, 2, num_v_heads=3)),
        ("pass head_dim", lambda: DeltaNet(24, 5)),
        ("at least 1", lambda: GatedDeltaNet(24, 0)),
        ("expected \\[B, T, dim\\]", lambda: DeltaNet(24, 2)(torch.randn(9, 24))),
        (
            "expected \\[1, T, dim\\] and \\[N \\+ 1\\]",
            lambda: DeltaNet(24, 2)(torch.randn(2, 9, 24), cu_seqlens=torch.tensor([0, 9])),
        ),
        (
            "the cache is of 3 sequences, got 1",
            lambda: (layer := DeltaNet(24, 2))(
                torch.randn(1, 9, 24), layer.new_cache(3), cu_seqlens=torch.tensor([0, 9])
            ),
        ),
        ("window is 0", lambda: SlidingWindowAttention(24, 2, 0)),
        ("lam_min", lambda: LocalLinearAttention(24, 2, lam=0.01, lam_min=0.1)),
        ("size is 0", lambda: ShortConvolution(4, 0)),
        ("even D", lambda: rotary(torch.randn(1, 4, 4, 2, 2))),
    ],
)
def test_bad_input_is_named(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_lla_cache_is_for_inference_and_has_an_end() -> None:
    layer = LocalLinearAttention(DIM, 2)
    with pytest.raises(ValueError, match="no_grad"):
        layer(torch.randn(1, 2, DIM), layer.new_cache(1, 4))
    with torch.no_grad(), pytest.raises(ValueError, match="5 tokens do not fit into a capacity of 4"):
        layer(torch.randn(1, 5, DIM), layer.new_cache(1, 4))
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens was given with a cache"):
        layer(torch.randn(1, 2, DIM), layer.new_cache(1, 4), cu_seqlens=offsets([2]))


def test_window_larger_than_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the input size"):
        NeighborhoodAttention1D(24, 4, 30)(torch.randn(1, 9, 24))
