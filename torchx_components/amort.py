"""TorchX components: the commands of torchrec-amort on any TorchX scheduler.

Example: torchx run -s local_cwd torchx_components/amort.py:train -j 1x2 -- --config examples/movielens.yaml
"""

from typing import Dict, Optional

from torchx import specs
from torchx.components import dist, utils
from torchx.version import TORCHX_IMAGE


def prepare(
    *args: str,
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    memMB: int = 4096,
) -> specs.AppDef:
    """Write a public data set as request-level Parquet, in one process.

    Args:
        args: arguments of `torchrec-amort prepare`, after `--`
        image: image or working directory to run in
        cpu: CPU cores
        memMB: memory in MB
    """
    return utils.python(*args, m="torchrec_amort.apps.prepare", image=image, name="prepare", cpu=cpu, memMB=memMB)


def train(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train a model with torchrun.

    Args:
        args: arguments of `torchrec-amort train`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of the scheduler, instead of cpu, gpu and memMB
        env: environment variables of the ranks
        max_retries: restarts of the whole job
    """
    return dist.ddp(
        *args,
        m="torchrec_amort.apps.train",
        name="train",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        env=env,
        max_retries=max_retries,
    )


def evaluate(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Evaluate a trained model with torchrun.

    Args:
        args: arguments of `torchrec-amort evaluate`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of the scheduler, instead of cpu, gpu and memMB
        env: environment variables of the ranks
        max_retries: restarts of the whole job
    """
    return dist.ddp(
        *args,
        m="torchrec_amort.apps.evaluate",
        name="evaluate",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        env=env,
        max_retries=max_retries,
    )


def benchmark(
    *args: str,
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
) -> specs.AppDef:
    """Time the same weights amortized and impression by impression, in one process.

    Args:
        args: arguments of `torchrec-amort benchmark`, after `--`
        image: image or working directory to run in
        cpu: CPU cores
        memMB: memory in MB
    """
    return utils.python(*args, m="torchrec_amort.apps.benchmark", image=image, name="benchmark", cpu=cpu, memMB=memMB)
