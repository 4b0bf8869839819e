"""A first call of every registered operator, beside its reference: what ``doctor`` runs.

Small problems with everything switched on, odd lengths, grouped heads. The truth is the reference in float64 on the
rounded inputs, the yardstick the same reference in the dtype of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield import delta_rule, delta_rule_step, gna, lla, local_linear_attention, probe_attention
from nearfield._accuracy import DELTA_FACTOR, Accuracy, measure
from nearfield.delta import (
    delta_rule_commit,
    delta_rule_reference,
    delta_rule_states,
    delta_rule_states_reference,
    delta_rule_verify,
)
from nearfield.lla import reference as lla_reference

Check = Callable[[torch.device, torch.dtype], dict[str, Accuracy]]
CHECKS: dict[str, Check] = {}  # by the operator's name in torch.ops.nearfield


def check(operator: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[operator] = function
        return function

    return add


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of states, gates and other float32 arguments."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Tensors = dict[str, Tensor]


def _results(function: Callable[..., Tensors], inputs: Tensors, upstream: Tensors | None) -> Tensors:
    """Outputs of ``function(**inputs)``, or with ``upstream`` the gradients of the inputs."""
    if upstream is None:
        with torch.no_grad():
            return function(**inputs)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(
        [outputs[name] for name in upstream],
        list(leaves.values()),
        [t.to(outputs[name]) for name, t in upstream.items()],
    )
    return {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _compare(
    ours: Callable[..., Tensors], reference: Callable[..., Tensors], inputs: Tensors, upstream: Tensors | None,
    device: torch.device, eager_dtype: torch.dtype | None = None, factor: float = 2.0, roundings: float = 0.0,
) -> dict[str, Accuracy]:  # fmt: skip
    """``inputs`` are on the CPU in the dtypes of the call; the yardstick runs in them or in ``eager_dtype``.

    ``roundings`` of the largest value are allowed, if more than one.
    """
    got = _results(ours, {name: t.to(device) for name, t in inputs.items()}, upstream)
    truth = _results(reference, {name: t.double() for name, t in inputs.items()}, upstream)
    eager = _results(reference, {n: t if eager_dtype is None else t.to(eager_dtype) for n, t in inputs.items()}, upstream)  # fmt: skip
    return {
        name: measure(
            got[name], truth[name], eager[name].to(got[name].dtype), factor,
            scale=roundings * float(truth[name].abs().max()) if truth[name].numel() else 0.0,
        )
        for name in got
    }  # fmt: skip


# ------------------------------------------------------------------------------------- neighborhood attention

WINDOW: dict[str, Any] = {
    "kernel_size": (5, 4),
    "stride": (2, 1),
    "dilation": (1, 2),
    "is_causal": (False, True),
}


def _gna_ours(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensors:
    options: dict[str, Any] = {"additional_keys": more_k, "additional_values": more_v, "return_lse": True}
    out, lse = gna.neighborhood_attention(q, k, v, **WINDOW, **options)
    return {"out": out, "lse": lse}


def _gna_reference(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensors:
    out, lse = gna.neighborhood_attention_reference(
        q, k, v, **WINDOW, scale=q.shape[-1] ** -0.5, additional_keys=more_k, additional_values=more_v
    )
    return {"out": out, "lse": lse}


def _gna(device: torch.device, dtype: torch.dtype, backward: bool) -> dict[str, Accuracy]:
    random = _random(1)
    q, grid = random(2, 9, 11, 4, 64), random(2, 2, 9, 11, 2, 64)
    more = random(2, 2, 3, 2, 64)
    inputs = {"q": q, "k": grid[0], "v": grid[1], "more_k": more[0], "more_v": more[1]}
    upstream = {"out": random(*q.shape), "lse": random(*q.shape[:-1])} if backward else None
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    return _compare(_gna_ours, _gna_reference, inputs, upstream, device)


@check("gna_fwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _gna(device, dtype, backward=False)


@check("gna_bwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _gna(device, dtype, backward=True)


@check("gna_fwd_8bit")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    """``dtype`` is the output's. The yardstick rounds the weights to 8 bits, as Hopper's kernel does, and lse by what
    8-bit products keep of a score."""
    size, random = (9, 11), _random(1)
    tensors = [random(2, *size, heads, 64).to(torch.float8_e4m3fn) for heads in (4, 2, 2)]
    descales = [random(2, 2).abs().add(0.5).float() for _ in tensors]
    names = ("q_descale", "k_descale", "v_descale")
    on_q, on_k, on_v = (t.to(device) for t in tensors)
    options: dict[str, Any] = {name: t.to(device) for name, t in zip(names, descales, strict=True)}
    with torch.no_grad():
        out, lse = gna.neighborhood_attention(
            on_q, on_k, on_v, **WINDOW, **options, out_dtype=dtype, return_lse=True
        )

    def wide(t: Tensor, descale: Tensor) -> Tensor:
        groups = descale.repeat_interleave(t.shape[-2] // 2, 1)
        return t.double() * groups.double()[:, None, None, :, None]

    q, k, v = (wide(t, descale) for t, descale in zip(tensors, descales, strict=True))
    keys, scale = size[0] * size[1], 64**-0.5
    true_out, true_lse = gna.neighborhood_attention_reference(q, k, v, **WINDOW, scale=scale)
    one_hot = torch.eye(keys, dtype=q.dtype).view(1, *size, 1, keys).expand(2, *size, 2, keys)
    p, _ = gna.neighborhood_attention_reference(q, k, one_hot, **WINDOW, scale=scale)
    largest = p.amax(-1, keepdim=True)
    rounded = (p / largest * 256).to(torch.float8_e4m3fn).double() / 256 * largest
    per_head = v.flatten(1, 2).repeat_interleave(2, 2)
    eager = torch.einsum("bxyhk,bkhd->bxyhd", rounded, per_head)
    terms = scale * torch.einsum("bxyhd,bkhd->bxyhk", q.abs(), k.flatten(1, 2).repeat_interleave(2, 2).abs())
    eager_lse = true_lse + 2.0**-14 * terms.amax(-1)
    return {"out": measure(out, true_out, eager.to(out.dtype)), "lse": measure(lse, true_lse, eager_lse)}


# ---------------------------------------------------------------------------------------------- the delta rule

DELTA = {"DeltaNet": (), "Gated DeltaNet": (1,), "KDA": (64,)}  # further sizes of the gate


def _delta_inputs(form: str, dtype: torch.dtype, length: int) -> Tensors:
    random, wide = _random(2), _wide(dtype)
    B, H, HV, D = 2, 2, 4, 64
    inputs = {
        "q": F.normalize(random(B, length, H, D), dim=-1).to(dtype),
        "k": F.normalize(random(B, length, H, D), dim=-1).to(dtype),
        "v": random(B, length, HV, D).to(dtype),
        "beta": random(B, length, HV).sigmoid().to(wide),
        "state": random(B, HV, D, D).to(wide),
    }
    if gate := DELTA[form]:
        g = -random(B, length, HV, *gate).abs().to(wide)
        inputs["g"] = g[..., 0] if gate == (1,) else g
    return inputs


def _delta(function: Any) -> Callable[..., Tensors]:
    def call(state: Tensor, **inputs: Tensor) -> Tensors:
        out, final = function(**inputs, initial_state=state, output_final_state=True)
        return {"out": out, "state": final}

    return call


def _delta_kept(v: Tensor, **inputs: Tensor) -> Tensors:
    """The forward of a call that will be differentiated."""
    with torch.enable_grad():
        results = _delta(delta_rule)(v=v.detach().requires_grad_(), **inputs)
    return {name: t.detach() for name, t in results.items()}


def _delta_chunks(
    device: torch.device, dtype: torch.dtype, backward: bool, ours: Callable[..., Tensors] | None = None
) -> dict[str, Accuracy]:
    found: dict[str, Accuracy] = {}
    for form in DELTA:
        inputs, random = _delta_inputs(form, dtype, 70), _random(3)
        upstream = {"out": random(*inputs["v"].shape), "state": random(*inputs["state"].shape)}
        parts = _compare(
            ours or _delta(delta_rule), _delta(delta_rule_reference), inputs, upstream if backward else None, device,
            eager_dtype=dtype, factor=DELTA_FACTOR,
        )  # fmt: skip
        found |= {f"{form} {name}": accuracy for name, accuracy in parts.items()}
    return found


@check("delta_fwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _delta_chunks(device, dtype, backward=False)


@check("delta_fwd_kept")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _delta_chunks(device, dtype, backward=False, ours=_delta_kept)


@check("delta_fwd_states")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    def ours(state: Tensor, **inputs: Any) -> Tensors:
        return {"states": delta_rule_states(**inputs, initial_state=state, every=1)[2]}

    def reference(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, g: Tensor | None = None
    ) -> Tensors:
        return {"states": delta_rule_states_reference(k, v, beta, g, 1, state)}

    found: dict[str, Accuracy] = {}
    for form in DELTA:
        inputs = _delta_inputs(form, dtype, 130)
        # What fades inside a chunk is the exponential of a sum of gates, which is rounded in units of its size.
        faded = float(inputs["g"][:, :64].sum(1).abs().max()) if "g" in inputs else 0.0
        parts = _compare(
            ours, reference, inputs, None, device, eager_dtype=dtype, factor=DELTA_FACTOR, roundings=faded
        )
        found |= {f"{form} {name}": accuracy for name, accuracy in parts.items()}
    return found


@check("delta_bwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _delta_chunks(device, dtype, backward=True)


@check("delta_step")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    def step(state: Tensor, **inputs: Any) -> Tensors:
        pool = state.clone()
        return {"out": delta_rule_step(**inputs, state=pool), "state": pool}

    return _delta_tokens(device, dtype, step)


@check("delta_verify")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    def verify(state: Tensor, **inputs: Any) -> Tensors:
        return {"out": delta_rule_verify(**inputs, state=state.clone())[0]}

    return _delta_tokens(device, dtype, verify)


@check("delta_commit")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    def commit(state: Tensor, **inputs: Any) -> Tensors:
        pool = state.clone()
        _, pending = delta_rule_verify(**inputs, state=pool)
        accepted = torch.full((len(pool),), inputs["q"].shape[1], device=pool.device)
        delta_rule_commit(pending, accepted, state=pool)
        return {"state": pool}

    return _delta_tokens(device, dtype, commit)


def _delta_tokens(
    device: torch.device, dtype: torch.dtype, ours: Callable[..., Tensors]
) -> dict[str, Accuracy]:
    """Three tokens, as in decoding."""
    found: dict[str, Accuracy] = {}
    for form in DELTA:
        inputs = _delta_inputs(form, dtype, 3)
        parts = _compare(ours, _delta(delta_rule_reference), inputs, None, device, dtype, DELTA_FACTOR)
        found |= {f"{form} {name}": accuracy for name, accuracy in parts.items()}
    return found


# --------------------------------------------------------------------------------------- local linear attention

LAM, CONVERGED = (
    0.7,
    {torch.float64: 1e-13},
)  # how far the solver goes; 1e-7 of the other dtypes is float32's end


def _lla_ours(dtype: torch.dtype) -> Callable[..., Tensors]:
    options: dict[str, Any] = {"lam": LAM, "tol": CONVERGED.get(dtype, 1e-7), "max_iters": 200}
    return lambda q, k, v: {"out": local_linear_attention(q, k, v, **options)}


def _lla_inputs(dtype: torch.dtype, queries: int = 70) -> Tensors:
    random = _random(4)
    return {
        "q": random(2, queries, 4, 32).to(dtype),
        "k": random(2, 70, 2, 32).to(dtype),
        "v": random(2, 70, 2, 64).to(dtype),
    }


def _lla(device: torch.device, dtype: torch.dtype, backward: bool) -> dict[str, Accuracy]:
    upstream = {"out": _random(5)(2, 70, 4, 64)} if backward else None
    # torch.linalg has no 16-bit solver, and the operator computes in float32 as well.
    return _compare(_lla_ours(dtype), _lla_direct, _lla_inputs(dtype), upstream, device, _wide(dtype))


def _lla_direct(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return {"out": lla_reference.local_linear_attention(q, k, v, lam=LAM)[0]}


@check("lla_fwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _lla(device, dtype, backward=False)


@check("lla_bwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _lla(device, dtype, backward=True)


def _probe(device: torch.device, dtype: torch.dtype, backward: bool) -> dict[str, Accuracy]:
    inputs = _lla_inputs(dtype) | {"x": _random(6)(2, 70, 4, 32).to(dtype)}
    upstream = {"out": _random(5)(2, 70, 4, 64)} if backward else None
    return _compare(
        lambda **t: {"out": probe_attention(**t)},
        lambda **t: {"out": lla_reference.probe_attention(**t)},
        inputs, upstream, device, _wide(dtype),
    )  # fmt: skip


@check("lla_probe_fwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _probe(device, dtype, backward=False)


@check("lla_probe_bwd")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _probe(device, dtype, backward=True)


@check("lla_step")
def _(device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
    return _compare(
        lambda q, k, v: {"out": lla.local_linear_attention_step(q, k, v, lam=LAM)},
        _lla_direct, _lla_inputs(dtype, queries=3), None, device, _wide(dtype),
    )  # fmt: skip
