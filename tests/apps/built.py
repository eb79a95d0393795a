"""Functions that `model.build` may name."""

from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.models.dlrm import DLRM

from tests.models.strangers import MMoE, make_bags
from tests.models.test_rankers import call_mmoe
from torchrec_amort import AmortizedEmbeddingBagCollection, AmortizedHistoryArch, HistoryTower, RequestSchema
from torchrec_amort.models.ranker import ModelRanker, Ranker
from torchrec_amort.modules.events import EventEncoder

PLACES = 8


def build(schema: RequestSchema) -> Ranker:
    """An MMoE with a history."""
    return _mmoe(schema, {feature.name: feature.table_size or 0 for feature in schema.of("candidate", "id", "ids")})


def build_of_other_tables(schema: RequestSchema) -> Ranker:
    return _mmoe(schema, {"movie_id": 3})


def build_dlrm(schema: RequestSchema) -> DLRM:
    return DLRM(make_bags({"user_id": (20, 8)}), 2, [8], [8, 1])


def build_nothing(schema: RequestSchema) -> Ranker:
    raise ValueError("no weights\nfor this")


def _mmoe(schema: RequestSchema, candidate_tables: dict[str, int]) -> Ranker:
    of_request = {feature.name: feature.table_size or 0 for feature in schema.of("request", "id", "ids")}
    (item,) = schema.of("candidate", "item")
    table = EmbeddingConfig(
        name="item",
        feature_names=["history_item", "candidate_item"],
        num_embeddings=item.table_size or 0,
        embedding_dim=8,
    )
    tower = HistoryTower(
        "clicks",
        AmortizedHistoryArch(8, num_layers=1, num_heads=2),
        events=EmbeddingCollection(tables=[table]),
        event_encoder=EventEncoder(["history_item"], 8, PLACES),
        starts_at_zero=False,
    )
    bags = make_bags({name: (rows, 8) for name, rows in (of_request | candidate_tables).items()})
    sparse = AmortizedEmbeddingBagCollection(bags, [tower], list(of_request))
    num_dense = len(schema.of("request", "dense")) + len(schema.of("candidate", "dense"))
    return ModelRanker(MMoE(sparse, num_dense), call_mmoe)
