"""The package is described in setup.cfg; only the native encoder needs code."""

import platform

from setuptools import Extension, setup

# One build for each kind of processor; the one at hand picks. Without a compiler that knows these options the package
# installs all the same, and encodes with PyTorch.
NATIVE = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}

setup(
    ext_modules=[
        Extension(
            f"torchrec_amort.ops._native_{kind}",
            ["torchrec_amort/ops/native.cpp"],
            depends=["torchrec_amort/ops/threads.h"],
            extra_compile_args=["-O3", "-std=gnu++17", "-pthread", *options],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for kind, options in NATIVE.items()
        if platform.machine() == "x86_64"
    ]
)
