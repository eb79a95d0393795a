"""What examples/deploy has is what the server and the cluster take."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from torchrec_amort.config import config_of, parser_of
from torchrec_amort.serving.rollout import RolloutCounters
from torchrec_amort.serving.server.call import Call
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.service import Timing
from torchrec_amort.serving.shadow import ShadowCounters

DEPLOY = Path(__file__).resolve().parents[1] / "examples" / "deploy"
VERSION = "1.31"


def manifests() -> dict[str, Any]:
    loaded = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    (of_kserve,) = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
    # KServe's predictor is a pod, and what KServe adds to it.
    spec = {key: value for key, value in of_kserve["spec"]["predictor"].items() if key != "minReplicas"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": of_kserve["metadata"], "spec": spec}
    return {manifest["kind"]: manifest for manifest in [*loaded, pod]}


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget", "StatefulSet", "Pod"])
def test_manifests_are_what_a_cluster_takes(kind: str) -> None:
    kubernetes_validate.validate(manifests()[kind], VERSION, strict=True)


@pytest.mark.parametrize("kind", ["StatefulSet", "Pod"])
def test_containers_are_started_with_options_that_there_are(kind: str) -> None:
    manifest = manifests()[kind]
    spec = manifest["spec"]["template"]["spec"] if kind == "StatefulSet" else manifest["spec"]
    (container,) = spec["containers"]
    config = config_of(parser_of(ServeConfig, "serve").parse_args(container["args"]), ServeConfig, "serve")
    assert {config.http_port, config.grpc_port} >= {port["containerPort"] for port in container["ports"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    assert config.seconds_unready < spec.get("terminationGracePeriodSeconds", 30)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    metrics = Metrics()
    call = Call("grpc", {})
    call.was_scored("monday", 128, Timing(0.001, 0.002))
    metrics.ended(call)
    metrics.scored(["monday"], 3)
    metrics.switched("ok")
    metrics.collect("service", lambda: dict.fromkeys(("refused", "displaced", "late"), 0))
    metrics.collect("cache", lambda: dict.fromkeys(("hits", "misses", "bytes"), 0))
    rollout = {**asdict(RolloutCounters()), **asdict(ShadowCounters()), "share": 0.1, "switched_back": 0}
    metrics.collect("rollout", lambda: rollout)
    told = set(re.findall(r"^(amort_\w+)", metrics.text().decode(), re.MULTILINE))
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    shown = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"amort_\w+", target["expr"])
    }
    assert len(panels) == 12 and shown <= told, shown - told
