"""Which versions there are, and which go together: an extension built for one torch may crash under another."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

# Minor versions of torch, and of torchrec and fbgemm, which are built for it.
PAIRS = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
BUILT_FOR_TORCH = ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
# What a result depends on.
PACKAGES = ("torchrec-amort", "torch", *BUILT_FOR_TORCH, "torchx", "numpy", "pyarrow")


def installed_versions() -> dict[str, str | None]:
    """The version of each of `PACKAGES`, None for one that is not installed.

    torch's tells its build, `+cpu` or `+cu130`, which the one that pip knows may leave out.
    """
    return {package: _version(package) for package in PACKAGES} | {"torch": torch.__version__}


def refuse_versions_apart() -> None:
    """Refuse torchrec and fbgemm that were built for another torch, before they are imported.

    Raises:
        ImportError: names both versions, and what to install.
    """
    minor = PAIRS.get(_minor(torch.__version__))
    if minor is None:
        raise ImportError(f"torch {torch.__version__} is none of those this package runs with: {', '.join(PAIRS)}")
    for package in BUILT_FOR_TORCH:
        found = _version(package)
        if found is not None and _minor(found) != minor:
            raise ImportError(
                f"{package} {found} does not go with torch {torch.__version__}: pip install '{package}=={minor}.*'"
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
