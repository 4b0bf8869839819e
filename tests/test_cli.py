"""The command line: its numbers against the planner's published ones, its checks against faults, its refusals."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("matplotlib", "rich", "typer"):
    pytest.importorskip(needed)

import nearfield  # noqa: E402
from command import assert_refused, run  # noqa: E402
from nearfield import _accuracy, _files, _planner, _runtime, cli  # noqa: E402
from nearfield.cli import checks, doctor, picture, simulate  # noqa: E402
from nearfield.gna.reference import visible_keys  # noqa: E402
from test_planner import PUBLISHED  # noqa: E402

# -------------------------------------------------------------------------------------------------------- doctor


def test_every_operator_of_the_build_is_checked() -> None:
    assert set(doctor.operators()) == set(checks.CHECKS)
    assert {"gna_fwd", "delta_bwd", "lla_step"} <= set(doctor.operators())


def test_first_calls_are_right() -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == (1 if report["problems"] else 0)
    assert report["build"]["nearfield"] == nearfield.__version__
    on_cpu = [o for o in report["operators"] if o["device"] == "cpu"]
    assert len(on_cpu) == len(checks.CHECKS) * len(_runtime.FLOAT_DTYPES)
    refused = {(o["operator"], o["dtype"]) for o in on_cpu if o["status"] == "refused"}
    assert refused == {("gna_fwd_8bit", "float32"), ("gna_fwd_8bit", "float64")}, (
        "outputs that 8-bit inputs do not have"
    )
    right = [o for o in on_cpu if o["status"] != "refused"]
    assert {o["status"] for o in right} == {"right"}
    for outcome in right:
        # A check that compares nothing would be off by exactly zero.
        assert 0 < outcome["error"] <= outcome["allowed"] < 0.1


@pytest.mark.parametrize(
    "change, status",
    [
        (lambda out: out * 1.01, "wrong"),
        (lambda out: torch.full_like(out, float("nan")), "wrong"),
        (lambda out: torch.full_like(out, float("inf")), "wrong"),
        (lambda out: 1 / 0, None),
    ],
    ids=["off-by-a-percent", "nan", "inf", "bug"],
)
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, change: Any, status: str | None) -> None:
    right = checks.gna.neighborhood_attention

    def faulty(*args: Any, **options: Any) -> Any:
        out, lse = right(*args, **options)
        return change(out), lse

    monkeypatch.setattr(checks.gna, "neighborhood_attention", faulty)
    call = ("gna_fwd", torch.device("cpu"), torch.float32)
    if status is None:  # not an error of the operator: it is not hidden
        with pytest.raises(ZeroDivisionError):
            doctor.first_call(*call)
        return
    outcome = doctor.first_call(*call)
    assert (outcome.status, outcome.part, outcome.is_problem) == (status, "out", True)


@pytest.mark.parametrize(
    "message, status",
    [
        ("gna_fwd: q has dtype Float; supported on CUDA: bfloat16, float16", "refused"),
        ("gna_fwd: the GPU has compute capability 8.0; this build is for 90a", "refused"),
        (
            "lla: this build has no kernel for compute capability 8.0; it was built without CUDA kernels",
            "refused",
        ),
        ("CUDA error: an illegal memory access was encountered", "failed"),
    ],
)
def test_refusals_are_no_failures(monkeypatch: pytest.MonkeyPatch, message: str, status: str) -> None:
    def raises(device: torch.device, dtype: torch.dtype) -> Any:
        raise RuntimeError(f"choose_backend, ../../csrc/gna/plan.cpp:96, {message}\nand a trace")

    monkeypatch.setitem(checks.CHECKS, "gna_fwd", raises)
    outcome = doctor.first_call("gna_fwd", torch.device("cpu"), torch.float32)
    assert (outcome.status, outcome.message) == (status, message)
    assert outcome.is_problem == (status == "failed")


def test_a_problem_shows_in_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device, dtype: torch.dtype) -> Any:
        return {"out": _accuracy.Accuracy(0.5, 0.1)}

    monkeypatch.setattr(doctor, "operators", lambda: ["gna_fwd", "gna_new"])
    monkeypatch.setattr(_runtime, "devices_with_kernel", lambda operator: frozenset({"cpu"}))
    monkeypatch.setitem(checks.CHECKS, "gna_fwd", wrong)
    code, out, _ = run("doctor")
    assert code == 1
    assert "problem: gna_fwd on cpu in float32: wrong: out is off by 0.5, allowed is 0.1" in out
    assert "gna_new on cpu in float16: unchecked" in out


@pytest.mark.parametrize(
    "arch, capability, expected",
    [
        ("90a", "9.0", True), ("90a", "10.0", False), ("80", "8.0", True), ("80", "8.9", True), ("86", "8.0", False),
        ("80", "9.0", False), ("100a", "10.0", True), ("100a", "10.3", False), ("120", "12.1", True),
    ],
)  # fmt: skip
def test_which_gpu_a_build_serves(arch: str, capability: str, expected: bool) -> None:
    assert doctor.serves(arch, capability) == expected
    gpu = {"device": "cuda:0", "name": "Some GPU", "capability": capability}
    assert bool(list(doctor.gpu_problems(gpu, f"{arch};70"))) == (not expected)
    assert "no CUDA kernels" in next(doctor.gpu_problems(gpu, "none"))


# ------------------------------------------------------------------------------------------------------ simulate


def text(values: Any) -> str:
    return ",".join(map(str, values if isinstance(values, tuple) else (values,)))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"X{text(row[0])}-S{text(row[2])}")
def test_simulate_prints_the_published_bounds(row: tuple[Any, ...]) -> None:
    grid, window, stride, tile, flop_bound, grid_bound, full_share, span_bound = row
    digits = 1 if len(grid) == 1 else 2
    for placement, bound in (("grid", grid_bound), ("span", span_bound)):
        code, out, _ = run(
            "simulate", text(grid), "--window", text(window), "--stride", text(stride), "--q-tile", text(tile),
            "--placement", placement, "--most", "1", "--json",
        )  # fmt: skip
        report = json.loads(out)
        assert code == 0
        assert round(report["flop_bound"], 2) == flop_bound
        assert report["tile_bound"] == pytest.approx(bound, abs=0.6 * 10**-digits)
        assert report["sparsity"] == pytest.approx(1 - 1 / flop_bound, abs=1e-3)
        if placement == "grid":
            assert round(report["mask_free_share"], 2) == full_share


def test_unfilled_blocks_are_paid_for() -> None:
    """The kernel multiplies whole blocks, so that no choice of boxes beats the arithmetic, and masks the gap."""
    problem = simulate.Problem((30, 48, 80), (18, 24, 24), (1, 1, 1), (1, 1, 1), (False,) * 3)
    tiling = simulate.Counter(128)(problem)
    [(block_m, block_n, _)] = _planner.kernel_blocks(128)
    assert (tiling.block_m, tiling.block_n) == (block_m, block_n) == (128, 128)
    filled = torch.Size(tiling.kv_tile).numel()
    assert 7 / 8 * block_n <= filled < block_n
    assert tiling.mask_free == 0
    assert tiling.tile_bound == pytest.approx(115200**2 / (block_m * block_n) / tiling.plan.visited, rel=1e-3)
    assert 1 / tiling.utilization == pytest.approx(tiling.plan.flop_bound / tiling.tile_bound, rel=1e-3)
    assert tiling.speedup == pytest.approx(tiling.tile_bound / 1.1)


@pytest.mark.parametrize("dim, direction", [(64, "forward"), (256, "forward"), (128, "backward")])
def test_blocks_are_those_of_the_kernels(dim: int, direction: Any) -> None:
    problem = simulate.Problem((64, 64), (16, 16), (1, 1), (1, 1), (False, False))
    tiling = simulate.Counter(dim, direction)(problem)
    expected = (tiling.block_m, tiling.block_n)
    assert expected in [block[:2] for block in _planner.kernel_blocks(dim, direction=direction)]
    assert all(
        torch.Size(t).numel() <= b for t, b in zip((tiling.q_tile, tiling.kv_tile), expected, strict=True)
    )


def test_strides_are_ranked() -> None:
    _, out, _ = run("simulate", "30x48x80", "--window", "18,24,24", "--json", "--most", "6")
    report = json.loads(out)
    *best, given = report["suggestions"]
    assert given["stride"] == [1, 1, 1]  # what was asked for is always in the table
    assert given["predicted_speedup"] == report["predicted_speedup"] < best[0]["predicted_speedup"]
    assert all(
        b["mask_free_share"] == 1 and b["tile_bound"] == pytest.approx(100 / 9, abs=0.01) for b in best
    )


@pytest.mark.parametrize(
    "arguments", [("16x24x24",), ("64x64", "--causal", "yes,no"), ("60x40", "--dilation", "2,1")]
)
def test_sparsity_is_kept(arguments: tuple[str, ...]) -> None:
    code, out, _ = run("simulate", *arguments, "--sparsity", "0.9", "--json", "--most", "5")
    report = json.loads(out)
    assert code == 0
    for row in report["suggestions"]:
        # A stride in a causal dimension cuts windows further.
        assert 0.9 <= row["sparsity"] <= (0.905 if "--causal" not in arguments else 1)
        problem = _planner.plan_tiles(
            report["grid"], row["window"], (4,) * len(row["window"]), (4,) * len(row["window"]),
            stride=row["stride"], dilation=report["dilation"], is_causal=report["causal"],
        )  # fmt: skip
        assert row["flop_bound"] == pytest.approx(problem.flop_bound)
    speedups = [row["predicted_speedup"] for row in report["suggestions"]]
    assert all(later <= 1.011 * earlier for earlier, later in itertools.pairwise(speedups))


def test_an_empty_grid_is_refused() -> None:
    assert_refused(run("simulate", "", "--window", "3"), "grid is empty: it has 0 dimensions")


@pytest.mark.parametrize("longest", [1, 2, 31, 32, 33, 48, 65, 1000, 2**22])
def test_window_choices_are_near_every_window(longest: int) -> None:
    found = simulate.window_choices(longest, 32)
    assert (found[0], found[-1]) == (1, longest)
    assert all(
        later == earlier + 1 or later <= earlier * 17 / 16 for earlier, later in itertools.pairwise(found)
    )


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_windows_of_long_sequences_are_found(sparsity: float) -> None:
    code, out, _ = run("simulate", "1048576", "--sparsity", str(sparsity), "--json", "--most", "1")
    assert code == 0
    assert sparsity <= json.loads(out)["sparsity"] <= sparsity + 0.05 * (1 - sparsity)


@pytest.mark.parametrize("causal", [False, True], ids=["free", "causal"])
@pytest.mark.parametrize("placement", ["span", "grid"])
def test_the_picture_shows_the_window_and_the_tiles(placement: Any, causal: bool) -> None:
    problem = simulate.Problem((23, 18), (5, 4), (2, 3), (2, 1), (causal, False))
    tiling = simulate.Counter(128, placement=placement)(problem, (3, 4), (4, 2))
    for query in ((0, 0), (11, 9), (22, 17)):
        for i, axis in enumerate(picture.axes_through(query, problem, tiling, placement)):
            dimension = (
                problem.grid[i],
                problem.window[i],
                problem.stride[i],
                problem.dilation[i],
                problem.causal[i],
            )

            def keys(
                index: int, d: int = problem.dilation[i], x: int = query[i], dimension: Any = dimension
            ) -> set[int]:
                return {key // d for key in visible_keys(x % d + d * index, *dimension)}

            assert set(range(*axis.keys)) == keys(axis.index)
            rows = [keys(index) for index in range(*axis.queries)]
            assert axis.index in range(*axis.queries)
            needed, common = set.union(*rows), set.intersection(*rows)
            covered = [(set(range(begin, begin + axis.tile)), full) for begin, full in axis.tiles()]
            assert needed <= set.union(*(tile for tile, _ in covered))
            assert all(tile & needed and full == (tile <= common) for tile, full in covered)


@pytest.mark.parametrize("grid, window", [("60", "9"), ("20x30", "5,6"), ("8x12x16", "3,4,5")])
def test_pictures_are_written(grid: str, window: str, tmp_path: Path) -> None:
    path = tmp_path / "window.png"
    code, out, _ = run("simulate", grid, "--window", window, "--picture", str(path), "--most", "1")
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "picture" in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("30x48x80x3 --window 3", "it has 4 dimensions; supported: 1, 2 or 3"),
        ("30x4a --window 3", "grid is 30x4a: whole numbers separated by x"),
        ("30xx40 --window 3", "grid is 30xx40: whole numbers separated by x"),
        ("1_0x40 --window 3", "grid is 1_0x40: whole numbers"),
        ("inf --window 3", "grid is inf: whole numbers"),
        ("99999999999999999999x2 --window 3", "grid holds 99999999999999999999; supported: numbers below"),
        ("4194305 --window 3", "supported: sides up to 4194304 in 1 dimension, and"),
        ("16384x16385 --window 3", "supported: sides up to 16384 in 2 dimensions"),
        ("2048x2048x65 --window 3", "and 268435456 tokens"),
        ("30x40 --window -3", "window holds -3; every side must be at least 1"),
        ("30x40 --window 3.5", "window is 3.5: whole numbers"),
        ("30x40 --window 9223372036854775808", "window holds 9223372036854775808; supported"),
        ("30x40 --window 3 --stride 9223372036854775808", "stride holds 9223372036854775808; supported"),
        ("30x40 --window 3 --stride=-1", "stride -1 is not between 1"),
        ("30x40 --window 3 --dilation 99", "window 3 times dilation 99 exceeds the grid's side 30"),
        ("30x40 --window 3 --dilation 2147483648", "dilation holds 2147483648; supported"),
        ("30x40 --window 3 --q-tile 99999999999999999999,1", "q-tile holds 99999999999999999999; supported"),
        ("30x40 --window 3 --q-tile 0,1", "q_tile has a side of 0"),
        ("30x40 --window 3 --query a,b --picture {}/a.png", "query is a,b: whole numbers"),
        ("30x40", "neither --window nor --sparsity"),
        ("30x40 --window 3 --sparsity 0.9", "both given"),
        ("30x40 --window 50", "window 50 times dilation 1 exceeds the grid's side 30"),
        ("30x40 --window 3,3,3", "window has 3 values; the grid has 2 dimensions"),
        ("30x40 --window 3 --stride 4", "stride 4 is not between 1 and the window 3"),
        ("30x40 --window 3 --stride 0", "stride 0 is not between 1"),
        ("30x40 --window 3 --dilation 0", "dilation holds 0"),
        ("30x40 --sparsity 0.9 --dilation 0", "dilation holds 0"),
        ("30x40 --sparsity 0.9 --dilation 31", "dilation 31 exceeds the grid's side 30"),
        ("0x40 --window 3", "grid holds 0"),
        ("0x40 --sparsity 0.5", "grid holds 0"),
        ("30x40 --window 3 --query 1,1", "--query is given without --picture"),
        ("30x40 --window 3 --query 1,99 --picture {}/a.png", "must be a position of the grid 30x40"),
        ("30x40 --window 3 --picture {}/a.jpg", "a name that ends in .png"),
        ("30x40 --window 3 --backward --picture {}/a.png", "leave out --backward"),
        ("30x40 --window 3 --picture {}/file/a.png", "file"),
        ("30x40 --sparsity 2", "sparsity is 2; it must be between 0 and 1"),
        ("30x40 --sparsity nan", "sparsity is nan"),
        ("30x40 --sparsity 1.5", "sparsity is 1.5; it must be between 0 and 1"),
        ("30x40 --sparsity=-1", "sparsity is -1; it must be between 0 and 1"),
        ("30x40 --sparsity much", "--sparsity"),
        ("30x40 --sparsity 0.9999", "no window on 30x40"),
        ("30x40 --window 3 --causal maybe", "causal is maybe: yes or no"),
        ("30x40 --window 3 --head-dim 999", "head-dim is 999; supported: 1 to 256"),
        ("30x40 --window 3 --head-dim x", "--head-dim"),
        ("30x40 --window 3 --placement left", "placement is left; supported: span, grid"),
        ("30x40 --window 3 --q-tile 1,300", "q_tile has a side of 300"),
        ("30x40 --window 3 --most 0", "most is 0"),
        ("30x40 --window 3 --nonsense", "No such option"),
        ("", "Missing argument"),
    ],
)  # fmt: skip
def test_simulate_refuses(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    outcome = run("simulate", *arguments.format(tmp_path).split())
    assert_refused(outcome, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------- the rest


def test_unknown_command() -> None:
    assert_refused(run("simulat"), "No such command")


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "NEEDED", ("rich", "a_missing_package"))
    assert cli.main([]) == 1
    assert capsys.readouterr() == (
        "", "nearfield: the command line needs a_missing_package; install with: pip install 'nearfield[cli]'\n",
    )  # fmt: skip


def test_the_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nearfield", "simulate", "30x40", "--window", "3", "--stride", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused((done.returncode, done.stdout, done.stderr), "stride 9 is not between 1 and the window 3")


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "a.txt"
    _files.write_atomically(path, "old")
    assert path.stat().st_mode & 0o777 == (tmp_path / "folder").stat().st_mode & 0o666

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        _files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_demo_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package)
    from nearfield.demo import __main__ as demo
    from nearfield.demo.report import Result, Row

    def part(out: Path, progress: Any, use_gpu: bool) -> Result:
        return Result("Title", "Text.", [Row("task", "method", f"gpu {use_gpu}", 1.0, "CPU")], [])

    monkeypatch.setattr(demo, "RUN", dict.fromkeys(demo.RUN, part))
    code, out, _ = run("demo", "recall", "--cpu", "--out", str(tmp_path))
    assert code == 0
    assert "gpu False" in out
    assert (tmp_path / "report.html").exists()
    assert_refused(run("demo", "nonsense"), "nonsense")


def test_the_demo_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.cli import demo

    monkeypatch.setattr(demo, "NEEDED", {"a_missing_module": "its-package"})
    assert_refused(run("demo"), "the demo needs its-package; install with: pip install 'nearfield[demo]'")


def test_simulate_without_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "_planner", None)
    assert_refused(run("simulate", "8", "--window", "3"), "this build has no planner")


def test_bench_refuses_a_folder_it_cannot_make_before_it_measures(tmp_path, monkeypatch, capsys):
    from nearfield.cli import app, bench

    def measure(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(bench, "measure_ceiling", measure)
    (tmp_path / "file").touch()
    assert app.run(["bench", "gna", "--cpu", "--out", str(tmp_path / "file" / "inside")]) == 1
    assert "Not a directory" in capsys.readouterr().err
