"""The scoring service as an application of Ray Serve, on the nodes of a Ray cluster. Needs the extras serve and ray.

    serve run examples.serve_ray:application package=/packages/monday

Run from the root of the clone. Every node has to have the package under that path. docs/deploying.md tells more.
"""

# Ray reads the annotation of `application`: no annotation is left as text here.
import gc
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from torchrec_amort import AmortizedScorer, HistoryCache, ScoringService, load_package
from torchrec_amort.serving.server.access import Access
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.server.rest import rest_app
from torchrec_amort.serving.versions import Version, Versions

# Of each replica: CPUs, requests that are scored at the same time, and those that wait for that.
CPUS, WORKERS, MAX_WAITING = 1, 1, 16
MAX_MESSAGE_BYTES = 2**24
SECONDS_TO_FORGET = 60.0


class Settings(BaseModel):
    """What the application is started with.

    Args:
        package: folder of the package that answers.
        cache_bytes: of encoded histories that each replica keeps.
    """

    package: str
    cache_bytes: int = 2**30


@serve.deployment(
    ray_actor_options={"num_cpus": CPUS},
    autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=2),
    max_ongoing_requests=WORKERS + MAX_WAITING,
    # By the header x-session-id, which is the user: whose history is in the cache of one replica.
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    ),
    # Replicas of another package are there before those of this one end.
    max_surge_percent=100,
)
@serve.ingress()
class Scores:
    """A replica: a package, its cache and its queue behind the paths of our server.

    Args:
        settings: of the application.

    Raises:
        InputError: as `load_package`.
    """

    def __init__(self, settings: Settings) -> None:
        own = serve.get_replica_context()
        self._replicas = serve.get_deployment_handle(own.deployment, own.app_name)
        # Work is spread over requests.
        torch.set_num_threads(1)
        # Garbage collection passes over what is imported, or a replica stands still for 0.2 s now and then.
        gc.freeze()
        folder = Path(settings.package)
        scorer = AmortizedScorer(load_package(folder), cache=HistoryCache(settings.cache_bytes))
        # Another package has replicas of its own: no request is kept to warm it up with.
        versions = Versions(Version(folder.resolve().name, scorer), num_recorded=0)
        service = ScoringService(versions, WORKERS, MAX_WAITING)
        metrics = Metrics()
        metrics.collect("service", service.counters)
        self._endpoint = Endpoint(
            versions.current.schema.dataset, versions, service, metrics, everywhere=self._everywhere
        )

    def __serve_build_asgi_app__(self) -> Any:
        return rest_app(self._endpoint, Access(), MAX_MESSAGE_BYTES)

    def act(self, action: str, *args: Any) -> Any:
        """Do here what all replicas do.

        Args:
            action: one of the endpoint's.
            args: its arguments.
        """
        return self._endpoint.actions[action](*args)

    def _everywhere(self, action: str, *args: Any) -> list[Any]:
        return self._replicas.broadcast("act", action, *args).results(timeout_s=SECONDS_TO_FORGET)


def application(settings: Settings) -> Application:
    """The application, as `serve run` and config files of Ray Serve start it.

    Args:
        settings: what it is started with.

    Example::

        serve.run(application(Settings(package="/packages/monday")), name="films")
    """
    deployment: Any = Scores  # mypy takes a class for what it was before its decorators
    return deployment.bind(settings)
