"""Builds the C++ ops where torch and a compiler are at hand; the package runs without them too.

SRLM_BUILD_EXT=auto (the default) leaves out with a warning what cannot be built, 0 builds nothing,
1 makes a failure an error. SRLM_PORTABLE=1 builds for every CPU of the architecture: without it the
library runs on CPUs like this one only.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

MODE = os.environ.get("SRLM_BUILD_EXT", "auto")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",  # vectors wider than a register are passed within one file only
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11: the oldest torch that a binary loads in
]


def skip(error: Exception) -> None:
    """Goes on without C++ ops, or fails if they were asked for."""
    if MODE == "1":
        raise error
    reason = " ".join(str(error).split())[:300]
    print(f"warning: C++ ops not built, {type(error).__name__}: {reason}", file=sys.stderr)


def extensions() -> dict[str, object]:
    """The arguments of setup() that build `srlm_kernels._C`.

    CPU ops only: CUDA ops would need a library of their own, since one that holds them does not
    load in a CPU build of torch.
    """
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                skip(error)
                self.extensions = []  # nothing to copy into the source tree

    native = [] if os.environ.get("SRLM_PORTABLE") == "1" else ["-march=native"]
    library = CppExtension(
        "srlm_kernels._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        extra_compile_args={"cxx": [*FLAGS, *native]},
        py_limited_api=True,
    )
    ninja = shutil.which("ninja") is not None
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=ninja, no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def arguments() -> dict[str, object]:
    """No extension, if it was not asked for or there is no torch to build it with."""
    if MODE not in {"auto", "0", "1"}:
        raise SystemExit(f"SRLM_BUILD_EXT must be auto, 0 or 1, got {MODE!r}")
    try:
        return {} if MODE == "0" else extensions()
    except Exception as error:  # an import of torch fails as OSError as often as ImportError
        skip(error)
        return {}


setup(**arguments())
