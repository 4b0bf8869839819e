"""The examples' tasks are what they say, their models learn, and their recorded results are of today's tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> object:
    """A module of the examples, whatever else is called so."""
    import importlib

    hidden = {n: sys.modules.pop(n) for n in ("models", "taylor", "training") if n in sys.modules}
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
        for n in ("models", "taylor", "training"):
            sys.modules.pop(n, None)
        sys.modules.update(hidden)


mqar, regression, taylor = load("mqar"), load("regression"), load("taylor")
MIXERS = list(mqar.MIXERS)  # type: ignore[attr-defined]


def test_every_question_has_its_answer_in_the_pairs() -> None:
    tokens, asked, answers = mqar.sample(16, 64, 12, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    assert tokens.shape == (16, 64)
    assert tokens.max() < 8192
    for row, places, values in zip(tokens, asked, answers, strict=True):
        told = dict(zip(row[:24:2].tolist(), row[1:24:2].tolist(), strict=True))
        assert len(told) == 12
        assert len(set(places.tolist())) == 12
        assert places.min() >= 24
        assert places.max() <= 62
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            assert told[int(row[place])] == value == int(row[place + 1])
            assert value >= 4096 > int(row[place]) > 0


def test_taylor_attention_is_its_feature_map() -> None:
    layer = taylor.TaylorLinearAttention(8, 2, 4).double()  # type: ignore[attr-defined]
    x = torch.randn(2, 7, 8).double()
    q, k, v = (part(x).unflatten(-1, (2, -1)) for part in (layer.q, layer.k, layer.v))

    def features(t: Tensor) -> Tensor:
        pairs = (t[..., :, None] * t[..., None, :]).flatten(-2) / (2 * 4) ** 0.5
        return torch.cat([torch.ones_like(t[..., :1]), t * 4**-0.25, pairs], -1)

    memory = (features(k)[..., None] * v[..., None, :]).cumsum(1)
    weight = features(k).cumsum(1)
    o = torch.einsum("bthf,bthfd->bthd", features(q), memory)
    o = o / torch.einsum("bthf,bthf->bth", features(q), weight)[..., None]
    torch.testing.assert_close(layer(x), layer.proj(o.flatten(-2)))


def test_ridge_regression_is_the_bayesian_prediction() -> None:
    x, y = regression.sample(3, 10, False, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    got = regression.ridge(x.double(), y.double())  # type: ignore[attr-defined]
    a, b, query = x[0, :6].double(), y[0, :6].double(), x[0, 6].double()
    kernel = a @ a.T / 4 + 0.01 * torch.eye(6)  # the prior variance of a weight is 1 / INPUTS
    torch.testing.assert_close(got[0, 6], (query @ a.T / 4) @ torch.linalg.solve(kernel, b))


@pytest.mark.parametrize("mixer", MIXERS)
def test_predictions_do_not_see_the_answer(mixer: str) -> None:
    model = regression.Model(mixer, 16, 1)  # type: ignore[attr-defined]
    x, y = regression.sample(2, 6, False, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    other = y.clone()
    other[:, 3:] += 1
    a, b = model(x, y), model(x, other)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().max() > 1e-4


def test_a_few_steps_teach_recall() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        untrained, *_ = mqar.train("lla", 16, 2, 64, 1, 32, 1e-2, "cpu")  # type: ignore[attr-defined]
        trained, *_ = mqar.train("lla", 16, 2, 64, 250, 32, 1e-2, "cpu")  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(threads)
    assert untrained < 0.05
    assert trained > 0.25


def test_recorded_results_cover_every_mixer() -> None:
    for name in ("mqar", "regression"):
        result = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
        assert result["task"] == name
        assert {row["mixer"] for row in result["rows"]} >= set(MIXERS)
        assert result["window"] == load("models").WINDOW  # type: ignore[attr-defined]


def test_recorded_seeds_are_those_of_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text()
    result = json.loads((EXAMPLES / "results" / "mqar-seeds.json").read_text())
    assert [row["mixer"] for row in result["rows"]] == MIXERS
    for row in result["rows"]:
        assert f"| {' | '.join(f'{accuracy:.1%}' for accuracy in row['accuracies'])} |" in text


@pytest.mark.parametrize(
    "script,arguments,text",
    [
        ("mqar", ["--mixer", "nonsense"], "nonsense"),
        ("mqar", ["--case", "64"], "length:pairs"),
        ("mqar", ["--case", "8:4"], "4 tokens per pair"),
        ("mqar", ["--seeds", "0"], "--seeds"),
        ("mqar", ["--out", "/proc/nowhere/a.json"], "/proc/nowhere"),
        ("regression", ["--mixer", "nonsense"], "nonsense"),
        ("regression", ["--out", "/proc"], "/proc"),
    ],
)
def test_bad_input_is_one_sentence(script: str, arguments: list[str], text: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr
