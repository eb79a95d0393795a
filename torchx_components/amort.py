"""TorchX components: the commands of torchrec-amort on any TorchX scheduler.

Example: torchx run -s local_cwd torchx_components/amort.py:train -j 1x2 -- --config examples/movielens.yaml

docs/launching.md has one command for each scheduler. TorchX takes the name of a component and the types and texts of
its options from the function, so each function spells out all of its own.
"""

from typing import Any, Dict, List, Optional, Tuple

from torchx import specs
from torchx.components import dist
from torchx.version import TORCHX_IMAGE


def prepare(
    *args: str,
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    memMB: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Write a public data set as request-level Parquet, in one process.

    Args:
        args: arguments of `torchrec-amort prepare`, after `--`
        image: image or working directory to run in
        cpu: CPU cores
        memMB: memory in MB
        h: a named resource, instead of cpu and memMB
        env: environment variables of the process: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
    """
    return _process("prepare", **locals())


def build(
    *args: str,
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Write raw logs as request-level Parquet, in one process, or in one that asks a cluster of Spark.

    Args:
        args: arguments of `torchrec-amort build`, after `--`
        image: image or working directory to run in
        cpu: CPU cores
        memMB: memory in MB
        h: a named resource, instead of cpu and memMB
        env: environment variables of the process: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
    """
    return _process("build", **locals())


def train(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train a model with torchrun.

    Args:
        args: arguments of `torchrec-amort train`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of each node, instead of cpu, gpu and memMB
        env: environment variables of the ranks: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
        max_restarts: how often torchrun may start all ranks again inside the job
        rdzv_port: port on the first of several nodes where they meet
    """
    return _torchrun("train", **locals())


def evaluate(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluate a trained model with torchrun.

    Args:
        args: arguments of `torchrec-amort evaluate`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of each node, instead of cpu, gpu and memMB
        env: environment variables of the ranks: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
        max_restarts: how often torchrun may start all ranks again inside the job
        rdzv_port: port on the first of several nodes where they meet
    """
    return _torchrun("evaluate", **locals())


def compare(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train, test and time several history encoders with torchrun.

    Args:
        args: arguments of `torchrec-amort compare`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of each node, instead of cpu, gpu and memMB
        env: environment variables of the ranks: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
        max_restarts: how often torchrun may start all ranks again inside the job
        rdzv_port: port on the first of several nodes where they meet
    """
    return _torchrun("compare", **locals())


def backtest(
    *args: str,
    j: str = "1x1",
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train day after day on logged requests, and test on the next one, with torchrun.

    Args:
        args: arguments of `torchrec-amort backtest`, after `--`
        j: nodes and ranks of each, as NODESxRANKS
        image: image or working directory to run in
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource of each node, instead of cpu, gpu and memMB
        env: environment variables of the ranks: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
        max_restarts: how often torchrun may start all ranks again inside the job
        rdzv_port: port on the first of several nodes where they meet
    """
    return _torchrun("backtest", **locals())


def benchmark(
    *args: str,
    image: str = TORCHX_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Time every way to score a request with the same weights, in one process.

    Args:
        args: arguments of `torchrec-amort benchmark`, after `--`
        image: image or working directory to run in
        cpu: CPU cores
        gpu: GPUs
        memMB: memory in MB
        h: a named resource, instead of cpu, gpu and memMB
        env: environment variables of the process: NAME=VALUE,...
        mounts: folders from outside the image: type=bind,src=/there,dst=/here,...
        max_retries: how often the scheduler may run the job again
    """
    return _process("benchmark", **locals())


# TorchX takes only the function that was asked for as a component, so these two may be in the same file.


def _torchrun(
    command: str, args: Tuple[str, ...], env: Optional[Dict[str, str]], max_restarts: int, **options: Any
) -> specs.AppDef:
    restarts = {
        # dist.ddp has no argument for them; torchrun reads its options from PET_... variables, too.
        "PET_MAX_RESTARTS": str(max_restarts),
        # Else ranks that are started again wait for those of before, on several nodes (pytorch/pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return dist.ddp(*args, m=f"torchrec_amort.apps.{command}", name=command, env={**restarts, **(env or {})}, **options)


def _process(
    command: str,
    args: Tuple[str, ...],
    image: str,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    max_retries: int,
    **resources: Any,
) -> specs.AppDef:
    role = specs.Role(
        name=command,
        image=image,
        entrypoint="python",
        args=["-m", f"torchrec_amort.apps.{command}", *args],
        resource=specs.resource(**resources),
        env=dict(env or {}),
        mounts=specs.parse_mounts(mounts or []),
        max_retries=max_retries,
    )
    return specs.AppDef(name=command, roles=[role])
