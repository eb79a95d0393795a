"""The package is described in setup.cfg; only its operators need code."""

import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPS = Path("torchrec_amort/ops")
# Kernels are compiled once for each kind of processor; the one at hand picks.
KINDS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
TORCH = find_spec("torch")
OPTIONS = ["-O3", "-std=gnu++20", "-pthread"]


class BuildOperators(build_ext):
    """Builds one library of objects that have options of their own, for the torch that is installed.

    It needs nothing of Python and is no module: its name tells torch's version instead of Python's.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library is."""
        return f"{fullname.replace('.', '/')}_torch{version('torch').partition('+')[0]}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""

        def objects(folder: str, sources: list[Path], options: list[str]) -> list[str]:
            output = str(Path(self.build_temp) / folder)
            compiled: list[str] = self.compiler.compile(list(map(str, sources)), output, extra_postargs=options)
            return compiled

        torch = Path(TORCH.origin).parent
        # PyTorch's threads are those of the OpenMP that it brings: that is not linked a second time.
        of_torch = [*OPTIONS, "-fopenmp", f"-I{torch / 'include'}"]
        built = objects("any", [OPS / "operators.cpp", OPS / "threads.cpp"], of_torch)
        for kind, options in KINDS.items():
            built += objects(kind, [OPS / "kernels.cpp"], [*OPTIONS, f"-DKERNELS={kind}", *options])
        self.compiler.link_shared_object(
            built,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=["-pthread"],
            target_lang="c++",
        )


# Without torch beside setuptools (pip install --no-build-isolation), or without a compiler, the package installs all
# the same, and PyTorch's operators serve.
native = Extension(
    "torchrec_amort.ops._native",
    [str(path) for path in sorted(OPS.glob("*.cpp"))],
    depends=[str(path) for path in sorted(OPS.glob("*.h"))],
    optional=True,
)
setup(
    ext_modules=[native] if platform.machine() == "x86_64" and TORCH else [],
    cmdclass={"build_ext": BuildOperators},
)
