"""The documentation builds strictly and without a network; its examples run, its commands and files exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

for needed in ("mkdocs", "material", "mkdocstrings", "matplotlib"):
    pytest.importorskip(needed)

import nearfield  # noqa: E402
from command import run  # noqa: E402
from nearfield import delta, distributed, gna, lla, nn  # noqa: E402
from nearfield.bench import groups  # noqa: E402

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
EXAMPLES = [
    (page, number, code)
    for page, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(root / "mkdocs.yml"),
        "-d",
        str(site),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "python"),
        "NO_MKDOCS_2_WARNING": "1",
        "https_proxy": "http://127.0.0.1:9",  # a build that fetched something would fail
        "http_proxy": "http://127.0.0.1:9",
    }
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """What a browser fetches by itself: scripts, style sheets, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.found.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given["href"])


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        if page.name == "404.html":  # its links are from the root of a server
            continue
        assert loads.found
        for source in loads.found:
            assert "://" not in source, f"{page.name} loads {source}"
            assert not source.startswith("//")
            assert (page.parent / source.split("?")[0]).exists(), (
                f"{page.name} loads {source}, which is not there"
            )


def test_every_public_function_is_documented(site: Path) -> None:
    ids = set(
        re.findall(r'id="(nearfield[\w.]+)"', "".join(p.read_text() for p in site.rglob("operators/*.html")))
    )
    functions = {name for name in nearfield.__all__ if callable(getattr(nearfield, name))}
    assert {f"nearfield.{name}" for name in functions} <= ids
    # The docstrings' sections are tables, not text.
    page = (site / "operators" / "gna.html").read_text()
    assert "<code>kernel_size</code>" in page
    page = (site / "layers.html").read_text()
    for module in (nn, distributed):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in page, name
    for family in (gna, delta, lla):
        exported = {name for name in family.__all__ if not hasattr(nearfield, name)}
        assert {f"{family.__name__}.{name}" for name in exported} <= ids


def test_every_group_of_benchmarks_has_a_place(site: Path) -> None:
    asked = {name for text in PAGES.values() for name in re.findall(r"<!-- bench: (\w+) -->", text)}
    assert asked == {*groups(), "models"}
    for name in groups():
        stored = list((ROOT / "bench" / "results").glob(f"*-{name}.json"))
        text = "".join(page.read_text() for page in site.rglob("operators/*.html"))
        assert (f"python -m nearfield bench {name}" in text) == (not stored)


def test_results_become_tables(tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").symlink_to(ROOT / "python")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    rows = [{"case": "A case of this test", "fwd_ms": 2.0, "cudnn_fwd_ms": 5.0}]
    (results / "some-gpu-gna.json").write_text(json.dumps({"gpu": "Some GPU", "rows": rows}))
    rows = [{"case": "A case of a variant", "fwd_ms": 2.0}]
    (results / "some-gpu-gna-variant.json").write_text(json.dumps({"group": "gna-variant", "rows": rows}))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "operators" / "gna.html").read_text()
    assert "A case of this test" in page
    assert "5 (2.50x)" in page
    assert "A case of a variant" in page
    assert (tmp_path / "site" / "pictures" / "some-gpu-gna.png").exists()
    # A page that asks for what is not there does not build.
    (tmp_path / "docs" / "index.md").write_text("<!-- bench: nonsense -->")
    assert "no group of benchmarks is named nonsense" in build(tmp_path, tmp_path / "site").stderr


@pytest.mark.parametrize("page, number, code", EXAMPLES, ids=lambda value: str(value)[:24])
def test_examples_run(page: str, number: int, code: str) -> None:
    exec(compile(code, f"docs/{page}, example {number + 1}", "exec"), {})


def test_commands_are_understood() -> None:
    commands = [
        c for text in PAGES.values() for c in re.findall(r"^    python -m nearfield (\w+)(.*)$", text, re.M)
    ]
    assert {name for name, _ in commands} == {"doctor", "simulate", "bench", "demo"}
    for name, rest in commands:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert all(option in out for option in re.findall(r"--[\w-]+", rest)), rest


def test_files_and_variables_exist() -> None:
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:csrc|python|include|tests|bench|docs)/[\w./*]+)`", text):
            if "X" not in name:
                assert list(ROOT.glob(name)), f"{page} names {name}"
        for name in re.findall(r"`(\w+\.(?:cuh|cpp|h|def))`", text):
            assert list(ROOT.glob(f"csrc/**/{name}")) or list(ROOT.glob(f"include/**/{name}")), (
                f"{page} names {name}"
            )
