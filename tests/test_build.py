"""What a build promises: its public names, its imports, what the library links."""

from __future__ import annotations

import ast
import re
import struct
import subprocess
import sys
from pathlib import Path

import nearfield
import pytest

PACKAGE = Path(nearfield.__file__).parent
ROOT = Path(__file__).parent.parent
PROGRAMS = {"bench", "cli", "demo"}  # may import what the extras install
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in PROGRAMS)


def imported_packages(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_torch_and_the_standard_library_are_imported(path: Path) -> None:
    foreign = imported_packages(path.read_text()) - set(sys.stdlib_module_names) - {"torch", "nearfield"}
    assert not foreign


def test_importing_leaves_the_programs_alone() -> None:
    code = (
        f"import nearfield, sys; print([m for m in sys.modules if m.startswith('nearfield.')"
        f" and m.split('.')[1] in {PROGRAMS}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_is_the_promise() -> None:
    # In a process of its own: other tests import submodules, which then are attributes of the package too.
    code = "import nearfield; print(*(name for name in vars(nearfield) if not name.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*done.stdout.split(), "__version__"} == set(nearfield.__all__)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_planner.pyi").exists()


def test_versions_agree() -> None:
    match = re.search(r'^VERSION = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert match is not None
    assert match[1] == nearfield.__version__
    assert f"## {nearfield.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_library_for_every_python() -> None:
    assert [path.name for path in PACKAGE.glob("_C*.so")] == ["_C.abi3.so"]


def needed_libraries(path: Path) -> set[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (section_table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    # Of each section header: type, file offset, size, linked section.
    sections = [struct.unpack_from("<4xI16xQQI", data, section_table + i * entry_size) for i in range(count)]
    _, start, size, strings = next(section for section in sections if section[0] == 6)  # SHT_DYNAMIC
    names = sections[strings][1]
    entries = struct.iter_unpack("<QQ", data[start : start + size])
    offsets = [names + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return {data[offset : data.index(b"\0", offset)].decode() for offset in offsets}


def test_the_library_names_libtorch() -> None:
    # The symbol of the CUDA stream is weak. A linker that drops libtorch.so as unneeded leaves it null, even where
    # torch has CUDA.
    assert "libtorch.so" in needed_libraries(PACKAGE / "_C.abi3.so")


def test_no_library_of_the_cuda_toolkit_is_needed() -> None:
    # One binary is for torch with and without CUDA.
    needed = needed_libraries(PACKAGE / "_C.abi3.so")
    assert not {name for name in needed if name.startswith(("libcuda", "libc10_cuda", "libtorch_cuda"))}
