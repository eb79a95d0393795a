"""The components as TorchX takes them, and what it would ask each scheduler for."""

import runpy
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.run import parse_args
from torchx import specs
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import Runner, get_runner

from tests.launch import ROOT

COMPONENTS = ROOT / "torchx_components" / "amort.py"
UNDER_TORCHRUN = ("train", "evaluate", "compare", "backtest")
ONE_PROCESS = ("prepare", "build", "benchmark")
RESOURCES = ["--cpu", "4", "--gpu", "1", "--memMB", "6000"]
MOUNTS = ["--mounts", "type=bind,src=/there,dst=/here"]
OPTIONS = ["-j", "2x3", *RESOURCES, *MOUNTS, "--image", "/tmp", "--env", "A=1,B=2", "--rdzv_port", "29600"]
RESTARTS = ["--max_retries", "4", "--max_restarts", "5"]
ARGUMENTS = ["--run_folder", "runs/x y"]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    settings = tmp_path / "torchxconfig"
    settings.touch()
    monkeypatch.setenv("TORCHXCONFIG", str(settings))
    # The local scheduler takes them over.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with get_runner() as made:
        yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


def dry_run(runner: Runner, scheduler: str, name: str = "train", **cfg: str) -> Any:
    """What a scheduler would get for two nodes."""
    args = [*OPTIONS, *RESTARTS, "--", *ARGUMENTS]
    return runner.dryrun_component(f"{COMPONENTS}:{name}", args, scheduler, cfg).request


def check_node(command: Sequence[str], env: Mapping[str, str], host: str, name: str = "train") -> None:
    """That torchrun, given this command and environment, does what the options ask for."""
    shell, line = command[:2], command[2]
    assert list(shell) == ["bash", "-c"]
    program, *args = shlex.split(line)
    assert program == "torchrun"
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in env.items():
            patch.setenv(variable, value)
        taken = parse_args(args)
    assert (taken.nnodes, taken.nproc_per_node, taken.max_restarts) == ("2", "3", 5)
    assert (taken.rdzv_backend, taken.rdzv_endpoint) == ("c10d", f"${{{host}:=localhost}}:29600")
    assert taken.rdzv_id
    assert taken.module
    assert [taken.training_script, *taken.training_script_args] == [f"torchrec_amort.apps.{name}", *ARGUMENTS]
    assert (env["A"], env["B"]) == ("1", "2")
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("name", [*UNDER_TORCHRUN, *ONE_PROCESS])
def test_torchx_accepts_the_component(name: str) -> None:
    case = ComponentTestCase()
    case.setUp()
    try:
        case.validate(SimpleNamespace(__file__=str(COMPONENTS)), name)
    finally:
        case.tearDown()


@pytest.mark.parametrize("name", [*UNDER_TORCHRUN, *ONE_PROCESS])
def test_a_named_resource_goes_before_the_others(name: str) -> None:
    app = runpy.run_path(str(COMPONENTS))[name](cpu=1, memMB=1, h="aws_m5.2xlarge")
    assert app.roles[0].resource == specs.named_resources["aws_m5.2xlarge"]


@pytest.mark.parametrize("name", UNDER_TORCHRUN)
def test_two_local_nodes(runner: Runner, name: str) -> None:
    nodes = dry_run(runner, "local_cwd", name).role_params[name]
    assert len(nodes) == 2
    for node in nodes:
        check_node(node.args, node.env, "TORCHX_RANK0_HOST", name)
        assert node.env["TORCHX_RANK0_HOST"] == "localhost"


def test_slurm(runner: Runner) -> None:
    request = dry_run(runner, "slurm", partition="night", time="60")
    assert list(request.replicas) == ["train-0", "train-1"]
    for node in request.replicas.values():
        check_node([node.entrypoint, *node.args], node.env, "SLURM_JOB_NODELIST_HET_GROUP_0")
        assert node.sbatch_opts == {
            "requeue": None,
            "partition": "night",
            "time": "60",
            "ntasks-per-node": "1",
            "cpus-per-task": "4",
            "gpus-per-task": "1",
            "mem": "6000",
        }
    script = request.materialize()
    assert "TORCHX_MAX_RETRIES=4" in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_kubernetes(runner: Runner) -> None:
    pytest.importorskip("kubernetes")
    with pytest.warns(UserWarning, match="Volcano"):
        job = dry_run(runner, "kubernetes", queue="night").resource["spec"]
    assert (job["queue"], job["maxRetry"]) == ("night", 4)
    assert len(job["tasks"]) == 2
    for host, task in zip(("TORCHX_RANK0_HOST", "VC_TRAIN_0_HOSTS"), job["tasks"], strict=True):
        assert task["maxRetry"] == 4
        assert {policy["event"]: policy["action"] for policy in task["policies"]} == {
            "PodEvicted": "RestartJob",
            "PodFailed": "RestartJob",
        }
        pod = task["template"].spec
        (node,) = pod.containers
        check_node(node.command, {variable.name: variable.value for variable in node.env}, host)
        assert node.resources.limits == {"cpu": "4000m", "memory": "6000M", "nvidia.com/gpu": "1"}
        assert node.resources.requests == {"cpu": "3900m", "memory": "4976M", "nvidia.com/gpu": "1"}
        assert (pod.volumes[1].host_path.path, node.volume_mounts[1].mount_path) == ("/there", "/here")


def test_aws_batch(runner: Runner) -> None:
    with pytest.warns(UserWarning, match="instance type"):
        job = dry_run(runner, "aws_batch", queue="night").job_def
    assert job["retryStrategy"]["attempts"] == 4
    (nodes,) = job["nodeProperties"]["nodeRangeProperties"]
    assert nodes["targetNodes"] == "0:1"
    node = nodes["container"]
    env = {variable["name"]: variable["value"] for variable in node["environment"]}
    check_node(node["command"], env, "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS")
    assert {resource["type"]: resource["value"] for resource in node["resourceRequirements"]} == {
        "VCPU": "4",
        "GPU": "1",
        "MEMORY": "6000",
    }
    assert node["volumes"][0]["host"]["sourcePath"] == "/there"
    assert node["mountPoints"][0]["containerPath"] == "/here"


def test_ray(runner: Runner) -> None:
    pytest.importorskip("ray")
    nodes = dry_run(runner, "ray").actors
    assert len(nodes) == 2
    for node in nodes:
        check_node(node.command, node.env, "TORCHX_RANK0_HOST")
        assert (node.num_cpus, node.num_gpus) == (4, 1)


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process(runner: Runner, name: str) -> None:
    resources = RESOURCES if name == "benchmark" else [*RESOURCES[:2], *RESOURCES[4:]]
    options = [*resources, *MOUNTS, "--image", "/tmp", "--env", "A=1,B=2", "--max_retries", "4"]
    (role,) = runner.dryrun_component(f"{COMPONENTS}:{name}", [*options, "--", *ARGUMENTS], "local_cwd")._app.roles
    assert (role.entrypoint, role.args) == ("python", ["-m", f"torchrec_amort.apps.{name}", *ARGUMENTS])
    assert role.resource == specs.Resource(cpu=4, gpu=int(name == "benchmark"), memMB=6000)
    assert role.env.items() >= {"A": "1", "B": "2"}.items()
    assert role.mounts == [specs.BindMount("/there", "/here")]
    assert (role.image, role.num_replicas, role.max_retries) == ("/tmp", 1, 4)
