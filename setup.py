"""Builds the optional C++ extension of the runtime; all other metadata is in pyproject.toml.

Without a C++ compiler the extension is skipped, and numpy computes the same.
"""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "arcflow_runtime.maths._speedups",
            ["runtime/arcflow_runtime/maths/speedups.cpp"],
            include_dirs=["runtime/kernels"],
            depends=sorted(str(p) for p in Path("runtime/kernels").glob("*.h")),
            # No fused multiply-add where the source has none, so that results are rounded as in numpy and torch.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off"],
            language="c++",
            optional=True,
        )
    ]
)
