"""Builds nearfield: CMake compiles the torch-free CUDA kernels, torch.utils.cpp_extension the rest.

Environment:
  NEARFIELD_CUDA        1: fail without nvcc; 0: CPU operators only; unset: use nvcc if it is there
  NEARFIELD_CUDA_ARCHS  e.g. "90a" or "80;90a;100a"; unset: the GPUs of this machine, else 90a
  NEARFIELD_FAMILIES    whose kernels to build, e.g. "delta" or "gna;lla"; unset: all
  CUDA_HOME             where nvcc is, if not in the usual place
  CUTLASS_INCLUDE_DIR   see third_party/README.md
  MAX_JOBS              parallel compile jobs
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "nearfield is built against the torch you run: install torch >= 2.11, then `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
TORCH_TARGET = "0x020b000000000000"  # the oldest torch the stable-ABI glue may call: 2.11


def find_nvcc() -> Path | None:
    if os.environ.get("NEARFIELD_CUDA") == "0":
        return None
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    candidates = [Path(root) / "bin" / "nvcc" for root in roots if root]
    if on_path := shutil.which("nvcc"):
        # nvcc on PATH may be a wrapper script: ask it where its toolkit is.
        dry = subprocess.run([on_path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
                             capture_output=True, text=True, check=False)  # fmt: skip
        if top := re.search(r"TOP=(\S+)", dry.stdout + dry.stderr):
            candidates.append(Path(top[1]) / "bin" / "nvcc")
    found = next((c for c in candidates if c.exists()), None)
    if found is None and os.environ.get("NEARFIELD_CUDA") == "1":
        sys.exit("NEARFIELD_CUDA=1, but no nvcc was found: set CUDA_HOME to the CUDA toolkit's folder")
    return found


def cuda_archs() -> str:
    if archs := os.environ.get("NEARFIELD_CUDA_ARCHS"):
        return archs.replace(",", ";")
    capabilities = set()
    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # From compute capability 9 on, the fast instructions exist only in the arch-specific ("a") target.
    return (
        ";".join(f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(capabilities))
        or "90a"
    )


def families() -> str:
    known = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/instances.def"))
    asked = os.environ.get("NEARFIELD_FAMILIES", "all").replace(",", ";")
    if unknown := set(asked.split(";")) - {*known, "all"}:
        sys.exit(f"NEARFIELD_FAMILIES names {', '.join(sorted(unknown))}; known: {', '.join(known)}, all")
    return asked


def cutlass_include() -> Path:
    candidates = [ROOT / "third_party" / "cutlass" / "include"]
    if custom := os.environ.get("CUTLASS_INCLUDE_DIR"):
        candidates.insert(0, Path(custom))
    spec = importlib.util.find_spec("cutlass_library")  # finds the folder without importing the package
    if spec and spec.submodule_search_locations:
        candidates.append(Path(spec.submodule_search_locations[0]) / "source" / "include")
    for candidate in candidates:
        if (candidate / "cute" / "tensor.hpp").exists():
            return candidate
    sys.exit(
        "CUTLASS headers not found: pip install --no-deps nvidia-cutlass==4.2.0 (or see third_party/README.md)"
    )


NVCC = find_nvcc()
PORTABLE = os.environ.get("NEARFIELD_PLANNER") == "0"  # a wheel that fits every Python
JOBS = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # A fixed folder: an editable install would compile in a fresh temporary one and never hit ccache.
        self.build_temp = str(
            ROOT / "build" / f"temp-{sys.implementation.cache_tag}-torch{torch.__version__}"
        )

    def build_extensions(self) -> None:
        if NVCC is None:
            print("nearfield: no nvcc, building the CPU operators only", file=sys.stderr)
        else:
            self.build_kernels()
        super().build_extensions()

    def build_kernels(self) -> None:
        out = ROOT / "build" / "cmake"
        ninja = shutil.which("ninja")
        if ninja is None:
            sys.exit("ninja not found: pip install ninja")
        subprocess.check_call([
            "cmake", "-S", str(ROOT), "-B", str(out), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CUDA_COMPILER={NVCC}",
            f"-DNEARFIELD_CUDA_ARCHS={cuda_archs()}", f"-DNEARFIELD_FAMILIES={families()}", f"-DCUTLASS_INCLUDE_DIR={cutlass_include()}",
        ])  # fmt: skip
        subprocess.check_call(["cmake", "--build", str(out), "--target", "nearfield_kernels", "-j", JOBS])
        ext = next(e for e in self.extensions if e.name == "nearfield._C")
        cudart = (out / "cudart_static.txt").read_text().strip()
        ext.extra_objects = [str(out / "libnearfield_kernels.a"), cudart]
        # Which kernels exist is decided by CMake alone; the glue reads its answer.
        ext.include_dirs.append(str(out / "generated"))


def extensions() -> list:
    ops = CppExtension(
        "nearfield._C",
        ["csrc/module.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*/*.cpp"))],
        include_dirs=[str(ROOT / "include"), str(ROOT / "csrc")],
        py_limited_api=True,
        extra_compile_args={"cxx": [
            "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi", f"-ffile-prefix-map={ROOT}/=",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(["-DNEARFIELD_WITH_CUDA"] if NVCC else []),
        ]},
        # --no-as-needed: the CUDA stream symbol is weak, so the linker would drop the library that has it.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL",
                         "-ldl", "-lrt", "-lpthread"],
    )  # fmt: skip
    # pybind11 has no limited API: leave it out of portable wheels.
    if PORTABLE:
        return [ops]
    from pybind11.setup_helpers import Pybind11Extension

    planner = Pybind11Extension(
        "nearfield._planner",
        ["csrc/planner.cpp"],
        include_dirs=[str(ROOT / "include"), str(ROOT / "csrc")],
        cxx_std=17,
    )
    return [ops, planner]


setup(
    version=VERSION,
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={"nearfield": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if PORTABLE else {},
)
