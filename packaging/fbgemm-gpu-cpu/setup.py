"""Stands for fbgemm-gpu on machines without CUDA.

torchrec requires the distribution `fbgemm-gpu`, whose published builds are for CUDA. This project has that name and no
code: it hands the requirement on to the CPU build, which installs the same module. `FBGEMM` names another version.
"""

import os

from setuptools import setup

FBGEMM = os.environ.get("FBGEMM", "1.8.0")

setup(
    name="fbgemm-gpu",
    version=f"{FBGEMM}+cpu",
    description="Stands for fbgemm-gpu on machines without CUDA.",
    packages=[],
    install_requires=[f"fbgemm-gpu-cpu=={FBGEMM}"],
)
