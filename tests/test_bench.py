"""The benchmarks: cases are well formed, checks find faults, results become tables and plots."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

for needed in ("matplotlib", "rich", "typer"):
    pytest.importorskip(needed)

from command import assert_refused, run  # noqa: E402
from nearfield.bench import blockwise, delta, gna, groups, lla, report, runner, timing  # noqa: E402
from nearfield.bench.case import OURS, Case, Pass  # noqa: E402
from nearfield.bench.ceiling import Ceiling  # noqa: E402
from nearfield.cli import app  # noqa: E402
from nearfield.gna.reference import visible_keys  # noqa: E402
from nearfield.lla.reference import local_linear_attention  # noqa: E402

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# The portable group has cases of the others again.
CASES = {case.name: case for group in reversed(groups().values()) for case in [*group.cases, *group.small]}


def test_cases_are_told_apart() -> None:
    for group in groups().values():
        names = [case.name for case in [*group.cases, *group.small]]
        assert len(set(names)) == len(names)
        assert group.cases
        assert group.small
        for case in [*group.cases, *group.small]:
            assert set(case.targets) <= set(group.passes)
            assert set(group.passes[:1]) <= set(case.work(torch.bfloat16)) <= set(get_args(Pass))
    assert list(groups()) == ["gna", "delta", "lla", "decode", "portable"]


def test_blockwise_peer_is_local_linear_attention() -> None:
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=torch.float64) for _ in range(3))
    lam = torch.tensor(1.0, dtype=torch.float64)
    rows = torch.arange(17, 30)
    heads = [t.transpose(1, 2) for t in (q[:, 17:30], k[:, :30], v[:, :30])]
    got = blockwise.of_rows(*heads, lam, rows, steps=12).transpose(1, 2)
    want = local_linear_attention(q, k, v, lam=1.0)[0][:, 17:30]
    # float32 holds the statistics.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def first_of_each_kind() -> list[Case]:
    small = [case for group in groups().values() for case in group.small]
    return list({case.kind: case for case in reversed(small)}.values())


@pytest.mark.parametrize("case", first_of_each_kind(), ids=lambda case: case.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checks_pass_and_compare_something(case: Case, dtype: torch.dtype) -> None:
    found = case.check(CPU, dtype)
    assert all(0 < accuracy.error <= accuracy.allowed < 0.2 for accuracy in found.values()), found


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_8_bits_are_checked_and_have_a_forward_only(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, with the operator of the CPU."""
    right = gna.neighborhood_attention

    def attend(q: torch.Tensor, *args: Any, **options: Any) -> Any:
        return right(q, *args, **options) * (factor if q.dtype == gna.FP8 else 1.0)

    monkeypatch.setattr(gna, "neighborhood_attention", attend)
    monkeypatch.setattr(gna.GnaCase, "_runs_in_8_bits", lambda self, device: True)
    results = runner.run_group(
        groups()["gna"], CPU, Ceiling(1, 1), only="1-D w256, small", passes=("fwd", "bwd")
    )
    if factor == 1.0:
        (row,) = results.rows
        assert row["float8_fwd_ms"] > 0
        assert not any(key.startswith("float8_bwd") for key in row)
    else:
        assert results.rows == []
        assert "out, float8 is off by" in results.failures[0]


@pytest.mark.parametrize(
    "module, name, case",
    [
        (gna, "neighborhood_attention", groups()["gna"].small[0]),
        (delta, "delta_rule", groups()["delta"].small[1]),
        (lla, "local_linear_attention", groups()["lla"].small[0]),
    ],
    ids=["gna", "delta", "lla"],
)
@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_wrong_results_are_not_timed(
    module: Any, name: str, case: Case, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, name)

    def wrong(*args: Any, **options: Any) -> Any:
        result = right(*args, **options)
        out = result[0] if isinstance(result, tuple) else result
        # Twice the value adds nothing to the output when it is taken off again without a gradient.
        bad = 1.001 * out if fault == "output" else 1.001 * out - 0.001 * out.detach()
        return (bad, *result[1:]) if isinstance(result, tuple) else bad

    monkeypatch.setattr(module, name, wrong)
    group = next(g for g in groups().values() if case in g.small)
    results = runner.run_group(group, CPU, Ceiling(1, 1), only=case.name)
    assert results.rows == []
    assert len(results.failures) == 1
    assert "is off by" in results.failures[0]


def test_work_is_counted() -> None:
    case = gna.GnaCase("", (10, 12), 3, 16, (4, 5), batch=2)
    forward = case.work(torch.float16)["fwd"]
    assert forward.flops == pytest.approx(
        2 * 2 * (120 * 20) * 16 * 3 * 2
    )  # two products over the needed pairs
    assert forward.bytes == 4 * (2 * 120 * 3 * 16) * 2
    assert Ceiling(tflops=2, gbs=1).least_ms(forward) == pytest.approx(forward.bytes / 1e6)
    assert Ceiling(tflops=1e-6, gbs=1e9).least_ms(forward) == pytest.approx(forward.flops / 1e3)
    line = gna.GnaCase("", (8,), 1, 16, (8,), causal=(True,))
    assert line.flop_bound() == pytest.approx(64 / 36)
    for x, window, stride, causal in itertools.product(range(11), (1, 4, 11), (1, 3), (False, True)):
        dimension = (x, 11, window, min(stride, window))
        assert gna.number_seen(*dimension, causal) == len(visible_keys(*dimension, 1, causal))
    windowed = lla.LlaCase(10, 1, 4, window=3).work(torch.float32)["fwd"]
    assert windowed.flops == pytest.approx((3 * lla.STEPS + 5) * 2 * (1 + 2 + 8 * 3) * 4)
    assert lla.GridCase((10,), (3,), 1, 4, (True,)).work(torch.float32)["fwd"] == windowed


class Broken:
    """A case whose contenders fail as told."""

    kind, targets = "broken", {}

    def __init__(self, name: str, ours: Exception | None, peer: Exception | None) -> None:
        self.name, self.ours, self.peer = name, ours, peer

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Any, Any]:
        return {}

    def check(self, device: torch.device, dtype: torch.dtype) -> Any:
        return first_of_each_kind()[0].check(device, dtype)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Any:
        def call(error: Exception | None) -> torch.Tensor:
            if error is not None:
                raise error
            return torch.zeros(1)

        yield runner.Contender(OURS, lambda: call(self.ours))
        yield runner.Contender("peer", lambda: call(self.peer))


def test_failures_are_told_apart() -> None:
    cases = [
        Broken("fine", None, None),
        Broken("no kernel", NotImplementedError("x: no kernel for device cuda; supported: cpu"), None),
        Broken("bug", RuntimeError("CUDA error: misaligned address\nmore"), None),
        Broken("peer", None, ImportError("no such symbol")),
    ]
    group = runner.Group("broken", "Broken", cases, cases, ("fwd",))
    results = runner.run_group(group, CPU, Ceiling(1, 1))
    assert [row["case"] for row in results.rows] == ["fine", "peer"]
    assert "peer_fwd_ms" in results.rows[0]
    assert results.rows[1]["peer_fwd_error"] == "no such symbol"
    assert results.refusals == {"no kernel": "x: no kernel for device cuda; supported: cpu"}
    assert results.failures == ["bug: CUDA error: misaligned address"]


def test_the_same_work_is_timed_once_and_rows_are_kept_as_they_come() -> None:
    cases = [gna.GnaCase(f"stride {stride}", (6, 8), 1, 16, (3, 4), (stride, 1)) for stride in (1, 2)]
    cases.append(gna.GnaCase("longer", (6, 9), 1, 16, (3, 4)))
    group = runner.Group("gna", "", cases, cases, ("fwd", "bwd"))
    kept: list[list[str]] = []
    results = runner.run_group(
        group, CPU, Ceiling(1, 1), keep=lambda so_far: kept.append([row["case"] for row in so_far.rows])
    )
    assert kept == [["stride 1"], ["stride 1", "stride 2"], ["stride 1", "stride 2", "longer"]]
    first, second, longer = ({k: v for k, v in row.items() if k.startswith("dense")} for row in results.rows)
    assert first
    assert first == second
    assert set(longer) == set(first)
    assert longer != first


# --------------------------------------------------------------------------------------------------- command line


def test_bench_writes_what_it_shows(tmp_path: Path) -> None:
    code, out, _ = run("bench", "gna", "decode", "--cpu", "--only", "1-D w256, small", "--out", str(tmp_path))
    assert code == 0
    assert "neighborhood attention: right" in out
    assert "scaled-down" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-gna.json", "cpu-gna.md", "cpu-gna.png"]
    data = report.load(tmp_path / "cpu-gna.json")
    (row,) = data["rows"]
    assert data["scaled_down"]
    assert data["group"] == "gna"
    assert {"fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms", "fwd_useful_tflops", "flop_bound"} <= set(row)
    assert row["flop_bound"] == 8.0
    assert data["checks"]["neighborhood attention"]["error"] > 0
    documented = (ROOT / "bench" / "README.md").read_text()
    patterns = [
        re.escape(key).replace("P_", "(fwd|bwd|fwdbwd)_").replace("X_", r"\w+?_")
        for key in re.findall(r"`([\w.,]+)`", documented)
    ]
    for key in [*data, *row]:
        assert any(re.fullmatch(pattern, key) for pattern in patterns), (
            f"bench/README.md does not explain {key}"
        )
    assert f"{row['fwd_ms']:.3g}"[:4] in (tmp_path / "cpu-gna.md").read_text()


def test_bench_lists() -> None:
    code, out, _ = run("bench", "--list", "--cpu")
    assert code == 0
    assert all(case.name in out for group in groups().values() for case in group.small)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "no group is named nonsense; there are: gna, delta"),
        (["--only", "nothing like it"], "no case of these groups has nothing like it"),
        (["gna", "--out", "{}/file"], "which is a file; a folder is expected"),
    ],
)
def test_bench_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run("bench", *(a.format(tmp_path) for a in arguments)), message)


def test_a_wrong_operator_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = gna.neighborhood_attention
    monkeypatch.setattr(gna, "neighborhood_attention", lambda *a, **o: 1.01 * right(*a, **o))
    code, out, _ = run("bench", "gna", "--cpu", "--only", "NAT", "--out", str(tmp_path / "out"))
    assert code == 1
    assert "problem: NAT D32, small: " in out
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- tables and plots

STORED = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0+cu130",
    "commit": "abc1234",
    "rows": [
        {"case": "Hunyuan s1", "fwd_ms": 42.0, "fwd_target_ms": 40, "cudnn_fwd_ms": 265.86, "fwd_host_us": 30.0,
         "flop_bound": 11.11, "fwd_roofline": 0.61, "fwd_useful_tflops": 350.2},
        {"case": "NAT", "fwd_ms": 0.4, "fwd_target_ms": 0.0, "bwd_ms": 1.25, "natten_fwd_ms": 1.3, "natten_bwd_error": "x"},
    ],
}  # fmt: skip


def stored(folder: Path, **change: Any) -> Path:
    path = folder / "h100-80gb-hbm3-gna.json"
    path.write_text(json.dumps(STORED | change))
    return path


def test_table(tmp_path: Path) -> None:
    data = report.load(stored(tmp_path))
    assert data["group"] == "gna"
    assert report.table(data, "fwd") == (
        ["case", "ms", "target", "TFLOP/s", "of roofline", "cuDNN (dense)", "NATTEN"],
        [
            ["Hunyuan s1", "42", "40", "350", "61%", "266 (6.33x)", ""],
            ["NAT", "0.4", "", "", "", "", "1.3 (3.25x)"],
        ],
    )
    assert report.table(data, "bwd") == (["case", "ms"], [["NAT", "1.25"]])
    assert report.table(data, "fwdbwd")[1] == []
    text = report.markdown(data)
    assert text.startswith("NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, commit abc1234.\n")
    assert "| NAT | 0.4 |" in text
    assert "**Backward**" in text


def test_plots_are_drawn(tmp_path: Path) -> None:
    for rows in (
        STORED["rows"],
        [{"case": "a", "fwdbwd_ms": 1.0}],
        [{"case": "a", "fwd_ms": 1.0, "fla_fwd_ms": 2.0}],
    ):
        data = report.load(stored(tmp_path, rows=rows))
        assert report.plot(data, "Title").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no times to plot"):
        report.plot(report.load(stored(tmp_path, rows=[{"case": "a"}])))


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', '{"rows": [{"name": "x"}]}'])
def test_broken_results_are_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        report.load(path)


def test_tables_find_their_place() -> None:
    page = "a\n<!-- bench: gna -->\nold\n<!-- /bench -->\nb\n<!-- bench: lla -->\n<!-- /bench -->\n"
    once = report.insert(page, "gna", "new\n")
    assert once == page.replace("old", "new")
    assert report.insert(once, "gna", "new\n") == once
    with pytest.raises(ValueError, match="bench: delta"):
        report.insert(page, "delta", "new")


def test_the_scripts_run(tmp_path: Path) -> None:
    path = stored(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench: gna -->\n<!-- /bench -->\n")
    for script, *arguments in (
        ["plot.py", path],
        ["table.py", path, "--into", page],
        ["models.py", "--help"],
        *([f"bench_{group}.py", "--help"] for group in groups()),
    ):
        command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)
    assert path.with_suffix(".png").exists()
    assert "| Hunyuan s1 | 42 |" in page.read_text()


@pytest.mark.parametrize("script", ["plot.py", "table.py"])
def test_scripts_refuse_what_is_no_result_file(script: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    for name, said in (("text.json", "is not JSON"), ("nowhere.json", "No such file")):
        command = [sys.executable, str(ROOT / "bench" / script), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


def test_file_names(tmp_path: Path) -> None:
    assert timing.result_path(tmp_path, "gna", STORED) == tmp_path / "h100-80gb-hbm3-gna.json"
    assert timing.result_path(tmp_path, "gna", {}) == tmp_path / "cpu-gna.json"
    assert app.run(["bench", "--list", "gna"]) == 0
