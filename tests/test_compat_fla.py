"""fla's signatures and results with our kernels; beside the real fla where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import nearfield
import pytest
import torch
from compare import assert_accurate
from nearfield.compat import fla as ours
from nearfield.delta.reference import delta_rule_reference
from nearfield.nn import DeltaNet, GatedDeltaNet
from torch import Tensor

HAS_FLA = importlib.util.find_spec("fla") is not None
needs_fla = pytest.mark.skipif(not HAS_FLA, reason="flash-linear-attention is not installed")

NAMES = [name for name in ours.__all__ if name.startswith(("chunk", "fused"))]
B, H, HV, K, V = 2, 2, 4, 8, 6


def inputs(
    T: int = 11, dtype: torch.dtype = torch.float64, hv: int = HV, channel: bool = False
) -> dict[str, Tensor]:
    k = torch.randn(B, T, H, K, dtype=dtype)
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": torch.randn(B, T, hv, V, dtype=dtype),
        "g": -torch.rand(*((B, T, hv, K) if channel else (B, T, hv)), dtype=dtype),
        "beta": torch.rand(B, T, hv, dtype=dtype),
    }


def call(name: str, x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor | None]:
    """One of our functions; DeltaNet's have no gate."""
    arguments = {
        key: value for key, value in x.items() if key != "g" or "_delta_rule" not in name or "gated" in name
    }
    result: tuple[Tensor, Tensor | None] = getattr(ours, name)(**arguments, **options)
    return result


def truth(name: str, x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor | None]:
    gated = "gated" in name or "kda" in name
    return delta_rule_reference(x["q"], x["k"], x["v"], x["beta"], x["g"] if gated else None, **options)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("T", [1, 5, 11])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_reference(name: str, T: int, grad: bool) -> None:
    x = inputs(T, hv=H if "chunk_delta" in name else HV, channel="kda" in name)
    state = torch.randn(B, x["v"].shape[2], K, V).double()
    before = state.clone()
    with torch.set_grad_enabled(grad):
        got = call(name, x, initial_state=state, output_final_state=True, scale=0.7)
    close(got, truth(name, x, initial_state=state, output_final_state=True, scale=0.7))
    assert torch.equal(state, before), "the caller's state must not change"
    with torch.set_grad_enabled(grad):
        got = call(name, x, use_qk_l2norm_in_kernel=True)
    assert got[1] is None
    close(got, truth(name, x, use_qk_l2norm=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    x = {key: t.requires_grad_() for key, t in inputs(channel="kda" in name).items()}
    state = torch.randn(B, HV, K, V).double().requires_grad_()
    used = [t for key, t in x.items() if key != "g" or "gated" in name or "kda" in name] + [state]
    results = [function(name, x, initial_state=state, output_final_state=True) for function in (call, truth)]
    weights = [torch.randn_like(t) for t in results[0] if t is not None]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(r, weights, strict=True)), used)
        for r in results
    ]
    close(*grads)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(name: str) -> None:
    x = {key: t[:1] for key, t in inputs(channel="kda" in name).items()}
    cu = torch.tensor([0, 4, 4, 11])
    state = torch.randn(3, HV, K, V).double()
    got = call(name, x, cu_seqlens=cu, initial_state=state, output_final_state=True)
    close(got, truth(name, x, cu_seqlens=cu, initial_state=state, output_final_state=True))


@pytest.mark.parametrize("name", [n for n in NAMES if "gated" in n or "kda" in n])
@pytest.mark.parametrize("T", [3, 11])
def test_gates_and_logits_inside(name: str, T: int) -> None:
    x = inputs(T, channel="kda" in name)
    x["g"], x["beta"] = torch.randn_like(x["g"]), torch.randn_like(x["beta"])
    A_log, dt_bias = torch.randn(HV).double(), torch.randn(HV * (K if "kda" in name else 1)).double()
    with torch.no_grad():
        got = call(
            name, x, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=True, state_v_first=True, output_final_state=True,
        )  # fmt: skip
        expected = truth(
            name, x, gate="softplus", A_log=A_log, dt_bias=dt_bias, beta_activation="sigmoid2", state_v_first=True,
            output_final_state=True,
        )  # fmt: skip
        close(got, expected)
        if "kda" not in name:
            return
        got = call(
            name,
            x,
            use_gate_in_kernel=True,
            dt_bias=dt_bias,
            lower_bound=-3.0,
            use_beta_sigmoid_in_kernel=True,
        )
        close(
            got, truth(name, x, gate="bounded", gate_bound=-3.0, dt_bias=dt_bias, beta_activation="sigmoid")
        )


def test_both_decays_multiply() -> None:
    x = inputs()
    gk = -torch.rand(*x["g"].shape, K).double()
    got = call("fused_recurrent_gated_delta_rule", x, gk=gk)
    close(got, truth("kda", {**x, "g": x["g"].unsqueeze(-1) + gk}))
    got = ours.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], gk=gk)
    close(got, truth("kda", {**x, "g": gk, "beta": torch.ones_like(x["beta"])}))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("fused") and "kda" not in n])
def test_without_beta_it_is_one(name: str) -> None:
    x = inputs()
    ones = {**x, "beta": torch.ones_like(x["beta"])}
    del x["beta"]
    close(call(name, x), truth(name, ones))


def test_mixed_dtypes_are_taken_as_fla_takes_them() -> None:
    x = inputs(dtype=torch.bfloat16)
    x["beta"], x["g"] = x["beta"].half(), x["g"].double()
    o, state = call(
        "chunk_gated_delta_rule",
        x,
        initial_state=torch.zeros(B, HV, K, V).bfloat16(),
        output_final_state=True,
    )
    assert o.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"])
def test_the_old_name_of_the_layout_works_and_warns(name: str) -> None:
    x = inputs(channel="kda" in name)
    expected = call(name, x, state_v_first=True, output_final_state=True)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        got = call(name, x, transpose_state_layout=True, output_final_state=True)
    close(got, expected)
    with pytest.raises(ValueError, match="not both"):
        call(name, x, transpose_state_layout=True, state_v_first=True)


def test_hints_for_flas_kernels_change_nothing() -> None:
    x = inputs(channel=True)
    plain = call("chunk_kda", x)
    hinted = call(
        "chunk_kda", x, chunk_size=32, safe_gate=True, lower_bound=-5.0, disable_recompute=True, cu_seqlens_cpu=torch.tensor([0])
    )  # fmt: skip
    close(hinted[0], plain[0])


@pytest.mark.parametrize(
    "name,options,error,text",
    [
        (
            "chunk_kda",
            {"cp_context": object()},
            NotImplementedError,
            "chunk_kda: cp_context is not supported",
        ),
        ("chunk_gated_delta_rule", {"cp_context": object()}, NotImplementedError, "cp_context"),
        (
            "chunk_kda",
            {"return_intermediate_states": True},
            NotImplementedError,
            "return_intermediate_states",
        ),
        ("chunk_kda", {"use_graph": True}, NotImplementedError, "use_graph"),
        ("chunk_kda", {"safe_gate": True, "use_gate_in_kernel": True}, ValueError, "lower_bound"),
        ("chunk_kda", {"use_gate_in_kernel": True}, ValueError, "A_log or lower_bound"),
        ("chunk_kda", {"use_gate_in_kernel": True, "lower_bound": -6.0}, ValueError, "lower_bound is -6.0"),
        (
            "fused_recurrent_gated_delta_rule",
            {"gv": torch.ones(1)},
            NotImplementedError,
            "gv is not supported",
        ),
        ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, ValueError, "use_beta_sigmoid_in_kernel"),
        ("chunk_delta_rule", {"head_first": True}, TypeError, "head_first"),
        ("fused_recurrent_kda", {"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(name, inputs(channel="kda" in name), **options)


@pytest.mark.skipif(HAS_FLA, reason="flash-linear-attention is installed")
def test_patch_without_fla_says_so() -> None:
    with pytest.raises(ImportError, match=r"patch: flash-linear-attention 0\.6 cannot be imported"):
        ours.patch()
    with pytest.raises(ImportError, match="register"):
        ours.register()


# ------------------------------------------------------------------------------------------ beside the real fla


@pytest.fixture
def fla() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        import fla.layers
        import fla.ops.delta_rule
        import fla.ops.gated_delta_rule
        import fla.ops.kda
    yield fla
    ours.unpatch()
    ours.unregister()


def home(fla: Any, name: str) -> Any:
    family = "kda" if "kda" in name else "gated_delta_rule" if "gated" in name else "delta_rule"
    return getattr(fla.ops, family)


@needs_fla
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_same(fla: Any, name: str) -> None:
    def shape(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(ours, name)) == shape(getattr(home(fla, name), name))


@needs_fla
@pytest.mark.parametrize("kind", ["gated", "kda", "delta"])
def test_results_are_those_of_flas_recurrences(fla: Any, kind: str) -> None:
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda

    hv = HV if kind == "kda" else H
    x = inputs(23, torch.float32, hv, kind == "kda")
    state = torch.randn(B, hv, K, V)
    if kind == "delta":
        heads_first = (x[key].transpose(1, 2) for key in ("q", "k", "v", "beta"))
        o, final = delta_rule_recurrence(*heads_first, initial_state=state)
        theirs, name = (o.transpose(1, 2), final), "chunk_delta_rule"
    else:
        naive, name = (
            (naive_recurrent_kda, "chunk_kda") if kind == "kda" else (naive_recurrent_gated_delta_rule, "chunk_gated_delta_rule")
        )  # fmt: skip
        theirs = naive(**x, initial_state=state, output_final_state=True)
    options = {"initial_state": state, "output_final_state": True}
    exact = {key: t.double() for key, t in x.items()}
    true = truth(name, exact, initial_state=state.double(), output_final_state=True)
    for what, got, t, eager in zip(("o", "state"), call(name, x, **options), true, theirs, strict=True):
        assert got is not None
        assert t is not None
        assert_accurate(what, got, t, eager)


@needs_fla
def test_patch_reaches_flas_layers_and_comes_back(fla: Any) -> None:
    theirs = [getattr(home(fla, name), name) for name in NAMES]
    layer = importlib.import_module("fla.layers.gated_deltanet")
    kept = [layer.chunk_gated_delta_rule]
    ours.patch()
    x = inputs()
    for name in NAMES:
        assert getattr(home(fla, name), name) not in theirs
    close(layer.chunk_gated_delta_rule(**x)[0], truth("gated", x)[0])
    with ours.patched():
        pass
    assert layer.chunk_gated_delta_rule is not kept[0], "the inner block must not undo the outer patch"
    ours.unpatch()
    assert layer.chunk_gated_delta_rule is kept[0]
    assert [getattr(home(fla, name), name) for name in NAMES] == theirs


@needs_fla
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "chunk_kda"])
def test_flas_registry_chooses_nearfield(fla: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = nearfield.delta.delta_rule

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(nearfield.delta, "delta_rule", counted)
    x = inputs(channel=name == "chunk_kda")
    ours.register()
    ours.register()
    function = getattr(home(fla, name), name)
    close(function(**x, output_final_state=True), truth(name, x, output_final_state=True))
    assert len(calls) == 1
    monkeypatch.setenv("FLA_NEARFIELD", "0")
    with pytest.raises(Exception):  # noqa: B017, PT011  (fla's own kernels do not run on a CPU, each in its own way)
        function(**x)
    monkeypatch.delenv("FLA_NEARFIELD")
    with pytest.raises(Exception):  # noqa: B017, PT011  (refused by us, so fla tries its own)
        function(**x, cp_context=object())
    assert len(calls) == 1
    ours.unregister()
    with pytest.raises(Exception):  # noqa: B017, PT011
        function(**x)
    assert len(calls) == 1


@needs_fla
@pytest.mark.parametrize("gate", [False, True])
def test_layers_load_flas_parameters(fla: Any, gate: bool) -> None:
    def parameters(layer: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    theirs = fla.layers.DeltaNet(hidden_size=24, num_heads=2, use_gate=gate)
    mine = DeltaNet(24, 2, use_output_gate=gate)
    assert parameters(mine) == parameters(theirs)
    mine.load_state_dict(theirs.state_dict())
    theirs = fla.layers.GatedDeltaNet(hidden_size=24, num_heads=2, head_dim=8, num_v_heads=4, use_gate=gate)
    other = GatedDeltaNet(24, 2, head_dim=8, num_v_heads=4, use_output_gate=gate)
    assert parameters(other) == parameters(theirs)
    other.load_state_dict(theirs.state_dict())
