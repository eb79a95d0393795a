"""What computes a module's function in its place keeps hooks, patches, subclasses and parametrizations, or refuses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchrec import EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRM
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from tests.conftest import SCHEMA
from tests.models import test_attach
from tests.models.test_attach import attach, disturb, history_parameters, make_dlrm, old_scores
from tests.serving.test_export import needs_build
from tests.serving.test_scorer import assert_same, by_impressions, make_batch, make_model
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedHistoryArch,
    AmortizedScorer,
    InputError,
    RequestBatch,
    RequestSchema,
    attach_history,
    export_package,
    load_package,
)
from torchrec_amort.serving.heads import CrossHead, DotHead, Head
from torchrec_amort.serving.native_encoder import why_not_native
from torchrec_amort.serving.phases import Backend, RankerPhases
from torchrec_amort.serving.served import serve

SIZES = [(5, 3), (0, 2), (8, 4)]


def other(value: Any) -> Any:
    """Something else of the same kind; norms and softmaxes do not undo it."""
    if isinstance(value, dict):
        return {key: other(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(other, value))
    of_kind: dict[type, Callable[[Any], Any]] = {
        Tensor: lambda rows: torch.sin(3 * rows) if rows.is_floating_point() else torch.zeros_like(rows),
        JaggedTensor: lambda rows: JaggedTensor(other(rows.values()), lengths=rows.lengths()),
        KeyedTensor: lambda rows: KeyedTensor(rows.keys(), rows.length_per_key(), other(rows.values())),
        KeyedJaggedTensor: lambda ids: KeyedJaggedTensor(
            ids.keys(), other(ids.values()), lengths=ids.lengths(), stride=ids.stride()
        ),
        RequestBatch: lambda batch: replace(batch, candidate_dense=other(batch.candidate_dense)),
    }
    # While it is exported, a tensor is of another class.
    return next((change(value) for kind, change in of_kind.items() if isinstance(value, kind)), value)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, output: other(output))


def hook_with_keywords(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, args, kwargs: (other(args), other(kwargs)), with_kwargs=True)


def patch(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: other(own(*args, **kwargs))


def derive(module: nn.Module) -> None:
    own = type(module).forward
    forward = lambda self, *args, **kwargs: other(own(self, *args, **kwargs))  # noqa: E731
    module.__class__ = type("Changed", (type(module),), {"forward": forward})


class Sine(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.sin(3 * weight)


def parametrize_weight(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Sine())


CHANGES: list[Callable[[nn.Module], None]] = [hook, hook_with_keywords, patch, derive, parametrize_weight]
BACKENDS: tuple[Backend, ...] = ("auto", "eager")
OF_ALL = [
    "sparse_arch",
    "sparse_arch.embedding_bag_collection",
    "dense_arch",
    "dense_arch.model",
    "dense_arch.model._mlp.0",
    "dense_arch.model._mlp.1._linear",
    "inter_arch",
    "over_arch",
    "over_arch.model",
    "over_arch.model.0",
    "over_arch.model.0._mlp",
    "over_arch.model.0._mlp.0",
    "over_arch.model.0._mlp.0._linear",
    "over_arch.model.1",
]
OF_HISTORY = [
    "request_sparse_arch",
    "sparse_arch.embedding_bag_collection.embedding_bags.movie_id",
    "history_embedding_collection",
    "history_embedding_collection.embeddings.item",
    "event_encoder",
    "event_encoder.recency",
    "event_encoder.dropout",
    "history_arch",
    "history_arch.layers.0",
    "history_arch.layers.1.query",
    "history_arch.layers.0.feedforward",
    "history_arch.layers.0.feedforward.1",
    "history_arch.layers.1.attention_norm",
    "history_arch.output_norm",
    "history_arch.vectors",
]
changes = pytest.mark.parametrize("change", CHANGES)
interactions = pytest.mark.parametrize("interaction", ["dot", "dcn"])


def parts_of(model: nn.Module, change: Callable[[nn.Module], None], names: list[str]) -> Iterator[str]:
    """The model itself, its parts of these names, and a cross net; those that can be changed so."""
    for name in ["", *names, "inter_arch.crossnet"]:
        is_there = name in dict(model.named_modules())
        if is_there and (change is not parametrize_weight or isinstance(model.get_submodule(name), nn.Linear)):
            yield name


def refuses_by_name(error: ValueError, name: str) -> bool:
    return (name or "model") in str(error) or "Changed" in str(error) or "scores otherwise" in str(error)


@changes
@interactions
def test_the_scorer_scores_as_the_model_or_refuses_the_part(
    change: Callable[[nn.Module], None], interaction: str
) -> None:
    batch, served = make_batch(SIZES), []
    before = by_impressions(make_model(interaction=interaction), batch)
    for name in parts_of(make_model(interaction=interaction), change, OF_ALL + OF_HISTORY):
        model = make_model(interaction=interaction)
        change(model.get_submodule(name))
        expected = by_impressions(model, batch)
        assert not torch.allclose(expected, before, atol=1e-4), name
        try:
            scores = [AmortizedScorer(model, 4, backend=backend).score(batch) for backend in BACKENDS]
        except ValueError as error:
            assert refuses_by_name(error, name), error
        else:
            served.append(name)
            for of_backend in scores:
                torch.testing.assert_close(of_backend, expected, rtol=0, atol=1e-5, msg=name)
    # What is called, and not computed in another place, may be anything.
    if change is not patch:
        assert {"over_arch.model.1", "history_arch.layers.1.query"} <= set(served)


@pytest.mark.parametrize("name", ["over_arch.model.0._mlp.0", "history_arch.layers.1.query", "event_encoder"])
def test_native_code_refuses_a_part_that_computes_something_else(name: str) -> None:
    model = make_model()
    AmortizedScorer(model, backend="native").score(make_batch(SIZES))
    hook(model.get_submodule(name))
    with pytest.raises(ValueError, match=rf"no native .*: {name} has a forward hook"):
        AmortizedScorer(model, backend="native").score(make_batch(SIZES))


@changes
@interactions
def test_attach_history_keeps_the_scores_or_refuses_the_part(
    change: Callable[[nn.Module], None], interaction: str
) -> None:
    batch, kept = test_attach.make_batch(SIZES), []
    for name in parts_of(make_dlrm(interaction), change, OF_ALL):
        # Of some initial weights the dense arch gives zeros alone, and then a change of it changes nothing.
        torch.manual_seed(0)
        dlrm = make_dlrm(interaction).eval()
        before = old_scores(dlrm, batch)
        change(dlrm.get_submodule(name))
        expected = old_scores(dlrm, batch)
        assert not torch.allclose(expected, before, atol=1e-5), name
        try:
            model = attach_history(dlrm, test_attach.make_collection(), AmortizedHistoryArch(8, num_heads=1))
        except ValueError as error:
            assert refuses_by_name(error, name or "dlrm"), error
            continue
        kept.append(name)
        assert torch.equal(model(batch), expected), name
        disturb(history_parameters(model).values())
        try:
            scores = AmortizedScorer(model).score(batch)
        except ValueError as error:
            assert refuses_by_name(error, name), error
        else:
            torch.testing.assert_close(scores, model(batch), rtol=0, atol=1e-4, msg=name)
    assert {"over_arch.model.0._mlp.0._linear", "over_arch.model.1"} <= set(kept)
    if change in (hook, hook_with_keywords, patch):
        assert "dense_arch" in kept
        assert ("inter_arch" in kept) == (interaction == "dot")


def head_of(model: nn.Module, num_request_dense: int) -> Head | None:
    phases = serve(model, torch.float32, "auto").phases
    assert isinstance(phases, RankerPhases)
    return phases.head(num_request_dense)


@needs_build
@interactions
def test_a_model_as_it_was_built_keeps_its_fast_head(interaction: str) -> None:
    kind = DotHead if interaction == "dot" else CrossHead
    assert isinstance(head_of(make_model(interaction=interaction), 1), kind)
    assert isinstance(head_of(attach(make_dlrm(interaction).eval(), num_vectors=2), 0), kind)


def test_an_activation_may_be_any() -> None:
    model, batch = make_model(), make_batch(SIZES)
    model.over_arch.model[0]._mlp[0]._activation_fn = nn.GELU()
    assert head_of(model, 1) is None
    assert_same(AmortizedScorer(model).score(batch), by_impressions(model, batch))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.feedforward.__setitem__(1, nn.GELU()),
        lambda layer: setattr(layer, "query", nn.Linear(8, 8)),
        lambda layer: setattr(layer.feedforward_norm, "eps", 0.1),
        lambda layer: layer.feedforward.append(nn.Tanh()),
        lambda layer: setattr(layer, "num_heads", 1),
    ],
)
def test_an_encoder_with_other_parts_is_not_left_to_native_code(change: Callable[[Any], None]) -> None:
    model, batch = make_model(), make_batch(SIZES)
    assert isinstance(model.history_arch, AmortizedHistoryArch)
    change(model.history_arch.layers[1])
    assert "history_arch.layers.1" in (why_not_native(model.history_arch, torch.float32) or "")
    if model.history_arch.layers[1].num_heads == model.history_arch.layers[0].num_heads:
        assert_same(AmortizedScorer(model).score(batch), by_impressions(model, batch))


def test_a_class_that_was_patched_runs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), make_batch(SIZES)
    own = AmortizedHistoryArch.score_candidates
    monkeypatch.setattr(AmortizedHistoryArch, "score_candidates", lambda *args: other(own(*args)))
    assert "score_candidates was replaced" in (why_not_native(model.history_arch, torch.float32) or "")
    assert_same(AmortizedScorer(model).score(batch), by_impressions(model, batch))


def test_a_model_whose_class_was_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AmortizedDLRM, "forward", lambda self, *args: torch.zeros(1))
    with pytest.raises(ValueError, match=r"^AmortizedDLRM\.forward was replaced"):
        AmortizedScorer(make_model())


class WithAnotherConstructor(AmortizedDLRM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "films"


def test_a_subclass_that_overrides_nothing_is_served() -> None:
    model, batch = make_model(), make_batch(SIZES)
    model.__class__ = WithAnotherConstructor
    assert_same(AmortizedScorer(model).score(batch), by_impressions(model, batch))


def quantized(model: nn.Module) -> nn.Module:
    module: nn.Module = quantize_embeddings(
        model,
        dtype=torch.qint8,
        inplace=False,
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    return module


def test_a_quantized_model_is_scored_as_it_is_and_not_exported(tmp_path: Any) -> None:
    model, batch = quantized(make_model()), make_batch(SIZES)
    assert isinstance(model, AmortizedDLRM)
    assert_same(AmortizedScorer(model).score(batch), by_impressions(model, batch))
    with pytest.raises(
        InputError,
        match=r"^the model cannot be exported: request_sparse_arch\..* is a Embed.* of torchrec\.quant",
    ):
        export_package(model, tmp_path / "package", SCHEMA)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear, which is no ranker: unwrap it, or build it on an AmortizedEmbedd"),
        (make_dlrm, "DLRM, which is no ranker: attach_history makes one of a DLRM"),
        (lambda: nn.parallel.DataParallel(nn.Linear(1, 1)), "DataParallel, which is no ranker: unwrap it"),
    ],
)
def test_another_model_is_one_clear_error(make: Callable[[], Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=f"^the model is a {message}"):
        AmortizedScorer(make())
    with pytest.raises(InputError, match=f"^the model cannot be exported: the model is a {message}"):
        export_package(make(), tmp_path / "package", SCHEMA)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("uncompiled")
def test_a_package_scores_as_a_model_with_hooks_or_is_not_written(tmp_path: Any) -> None:
    model, batch = make_model(), make_batch(SIZES)
    hook(model.over_arch.model[0])
    assert export_package(model, tmp_path / "package", SCHEMA, tables="float32") < 1e-4
    assert_same(AmortizedScorer(load_package(tmp_path / "package")).score(batch), by_impressions(model, batch))
    model.over_arch.register_forward_hook(
        lambda _, args, output: output + 1 if torch.compiler.is_exporting() else output
    )
    with pytest.raises(
        InputError, match=r"a compiled probability differs by 2\.\de-01 from PyTorch's, more than 1e-03"
    ):
        export_package(model, tmp_path / "other", SCHEMA, tables="float32")
    hook(model.sparse_arch.embedding_bag_collection)
    with pytest.raises(InputError, match=r"sparse_arch.*embedding_bag_collection has a forward hook"):
        export_package(model, tmp_path / "other", SCHEMA)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_schema_whose_requests_the_model_would_refuse_is_refused_at_once(tmp_path: Any) -> None:
    assert isinstance(make_dlrm(), DLRM)
    with pytest.raises(InputError, match="the model reads 'f0' on the candidate side, and the schema has it on none"):
        export_package(attach(make_dlrm().eval()), tmp_path / "package", SCHEMA)
    model = make_model()
    model.sparse_arch, model.request_sparse_arch = model.request_sparse_arch, model.sparse_arch
    with pytest.raises(
        InputError,
        match="schema 'films': the model reads 'user_id' on the candidate side, and the schema has it on the request",
    ):
        export_package(model, tmp_path / "package", SCHEMA)
    without_hour = RequestSchema("films", tuple(feature for feature in SCHEMA.features if feature.name != "hour"))
    with pytest.raises(
        InputError, match="request_dense has 0 columns and candidate_dense 1, but the model reads 2 dense inputs"
    ):
        export_package(make_model(), tmp_path / "package", without_hour)
    assert not list(tmp_path.iterdir())
