"""User history for TorchRec DLRMs, encoded once per request and read by every candidate."""

from torchrec_amort.versions import refuse_versions_apart

refuse_versions_apart()

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_ids
from torchrec_amort.models.attach import attach_history
from torchrec_amort.models.build import ModelConfig, build_model
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, RequestState
from torchrec_amort.models.dlrm import AmortizedDLRM, AmortizedDLRMTrain
from torchrec_amort.models.graft import graft
from torchrec_amort.models.residual import ResidualHistory
from torchrec_amort.modules.encoder import HistoryEncoder, HistoryState
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import Feature, RequestSchema, TableConfig
from torchrec_amort.serving.cache import HistoryCache
from torchrec_amort.serving.export import export_package
from torchrec_amort.serving.package import load_package
from torchrec_amort.serving.rollout import Rollout, score_impressions, user_places
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.service import Overloaded, ScoringService

__all__ = [
    "RequestBatch",
    "AmortizedHistoryArch",
    "HistoryState",
    "AmortizedDLRM",
    "AmortizedDLRMTrain",
    "attach_history",
    "AmortizedEmbeddingBagCollection",
    "HistoryTower",
    "RequestState",
    "ResidualHistory",
    "graft",
    "AmortizedScorer",
    "HistoryCache",
    "Overloaded",
    "Rollout",
    "ScoringService",
    "export_package",
    "load_package",
    "score_impressions",
    "user_places",
    "EventEncoder",
    "HistoryEncoder",
    "Feature",
    "InputError",
    "ModelConfig",
    "RequestSchema",
    "TableConfig",
    "build_model",
    "hash_ids",
]
