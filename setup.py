"""The compiled part of the runtime; everything else is in pyproject.toml. Without a compiler it is left out."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "arcflow_runtime.maths._speedups",
            ["runtime/arcflow_runtime/maths/speedups.cpp"],
            include_dirs=["runtime/kernels"],
            depends=sorted(str(p) for p in Path("runtime/kernels").glob("*.h")),
            # Products and sums are rounded as numpy and torch round them.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off"],
            language="c++",
            optional=True,
        )
    ]
)
