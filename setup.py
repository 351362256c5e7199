"""The compiled extension and its environment switches; everything else is in pyproject.toml.

ATSNN_NO_EXTENSION=1   install without the native kernels (the reference backend computes)
ATSNN_DEBUG=1          build with assertions and debug information, without optimisation
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    debug = os.environ.get("ATSNN_DEBUG") == "1"
    # Spikes are compared bit for bit with the reference: no contraction to fused multiply-add.
    compile_args = ["-std=c++20", "-O0" if debug else "-O3", "-ffp-contract=off", "-fno-math-errno"]
    compile_args += ["-fno-trapping-math", "-Wall", "-fvisibility=hidden"]
    compile_args += ["-g", "-UNDEBUG"] if debug else ["-g0", "-DNDEBUG"]
    # Compiled for OpenMP but not linked with it: the symbols come from the runtime PyTorch has
    # loaded, so that there is only one in the process.
    if sys.platform == "linux":
        compile_args.append("-fopenmp")
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    # setuptools wants paths relative to this file.
    return {
        "ext_modules": [
            CppExtension(
                "atsnn._C",
                [str(source.relative_to(ROOT)) for source in sources],
                include_dirs=[str(ROOT / "csrc")],
                # Without these setuptools would not build again when only a header changed.
                depends=[str(header) for header in sorted((ROOT / "csrc").rglob("*.h"))],
                extra_compile_args=compile_args,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
    }


setup(**({} if os.environ.get("ATSNN_NO_EXTENSION") == "1" else extension()))
