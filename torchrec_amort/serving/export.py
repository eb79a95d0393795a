"""Export: a model compiled to a package; `package.py` tells what that is, and opens it.

Shape suffixes: n events and m candidates of the one request; I dense inputs; W widths of tables and bags; T tasks.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.sample import random_requests
from torchrec_amort.errors import InputError
from torchrec_amort.files import new_folder
from torchrec_amort.lists import shortest
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.models.ranker import Call, CollectionRanker
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import MeanPooling
from torchrec_amort.modules.similarity import HistoryMatches, HistorySimilarity
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.ops.native import EmbeddingRows, load_library
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.heads import Head
from torchrec_amort.serving.lookup import PLAIN_TABLES, Embeddings, Lookups
from torchrec_amort.serving.package import (
    PACKAGE_VERSION,
    TABLES_FILE,
    load_package,
    row_count,
    save_tables,
    signer,
    to_state,
    to_tensors,
    write_manifest,
)
from torchrec_amort.serving.phases import RankerPhases, RequestTerms, ServedTower
from torchrec_amort.serving.samples import write_samples
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.served import Served, serve
from torchrec_amort.versions import installed_versions

Tables = Literal["int8", "float32"]
_TABLE_DTYPES = {"int8": torch.qint8, "float32": torch.float32}
CHECKED_REQUESTS = 20
# How much probabilities of a package may differ from those of PyTorch with the same tables: compiled code adds up in
# another order, and rounds to 8 bits in other places. More than this is another function.
_MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Whether requests are folded in is compiled: as is cheaper for so many candidates.
_USUAL_CANDIDATES = 64
# Encoders without native operators.
_IN_PYTORCH = (MeanPooling, HistorySimilarity, HistoryMatches)


class _History(nn.Module):
    """Embeddings of events, [n, W] of each feature, to the tensors of their state."""

    def __init__(self, tower: ServedTower, features: Sequence[str], beside_pytorch: bool) -> None:
        super().__init__()
        self.tower, self.features, self.beside_pytorch = tower, list(features), beside_pytorch
        self.parts = tower.module(beside_pytorch)

    def forward(self, events: list[Tensor]) -> tuple[Tensor, ...]:
        rows = {name: EmbeddingRows(rows_nW) for name, rows_nW in zip(self.features, events, strict=True)}
        return to_tensors(self.tower.encode(rows, row_count(events[0].shape[0]), self.beside_pytorch))


class _Request(nn.Module):
    """A request's dense inputs [1, I_r] and bags [1, W] to the terms of a head."""

    def __init__(self, phases: RankerPhases, head: Head) -> None:
        super().__init__()
        self.phases, self.head, self.fits = phases, head, phases.fits

    def forward(self, dense_BI: Tensor, bags: list[Tensor]) -> tuple[Tensor, ...]:
        return self.head.request(dense_BI, self.phases.fitted(_named(self.phases.request_bags, bags)))


class _Candidates(nn.Module):
    """State of each tower, terms, and candidates' dense inputs [m, I_c], bags and items [m, W] to logits [m, T].

    Without a head, the terms are a request's dense inputs and bags.
    """

    def __init__(
        self, phases: RankerPhases, head: Head | None, items: Mapping[str, Sequence[str]], num_keys: Sequence[Any]
    ) -> None:
        super().__init__()
        self.phases, self.head, self.items, self.num_keys = phases, head, dict(items), list(num_keys)
        towers = [tower.module(beside_pytorch=head is None) for tower in phases.towers.values()]
        self.parts = nn.ModuleList([*towers, phases.fits, phases.ranker if head is None else head])

    def forward(
        self,
        states: list[list[Tensor]],
        terms: list[Tensor],
        dense_CI: Tensor,
        bags: list[Tensor],
        items: list[Tensor],
    ) -> Tensor:
        rows = iter(items)
        of_items = {tower: _named(names, [next(rows) for _ in names]) for tower, names in self.items.items()}
        histories = {
            name: [to_state(state, num_keys)]
            for name, state, num_keys in zip(self.phases.towers, states, self.num_keys, strict=True)
        }
        of_request = dense_CI.new_empty(1, 0) if self.head is not None else terms[0]
        batch = _dense_batch(of_request, dense_CI)
        given = RequestTerms(tuple(terms if self.head is not None else terms[1:]), self.head)
        return self.phases.score(given, histories, batch, _named(self.phases.candidate_bags, bags), of_items)


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> Embeddings:
    return {name: EmbeddingRows(rows) for name, rows in zip(names, tensors, strict=True)}


def _dense_batch(request_dense: Tensor, candidate_dense: Tensor) -> RequestBatch:
    """A batch of one request that has no ids: they are looked up already."""
    none = KeyedJaggedTensor([], torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0, dtype=torch.int64))
    return RequestBatch(
        request_dense=request_dense,
        candidate_dense=candidate_dense,
        request_sparse=none,
        candidate_sparse=none,
        sequences=none,
        num_candidates=row_count(candidate_dense.shape[0]),
    )


def export_package(
    model: nn.Module,
    folder: str | Path,
    schema: RequestSchema,
    *,
    call: Call | None = None,
    dtype: torch.dtype = torch.float32,
    tables: Tables = "int8",
    overwrite: bool = False,
    signing_key: str | Path | None = None,
) -> float:
    """Write a model as a package, whole or not at all: it has been loaded and has scored requests of the schema.

    Args:
        model: a ranker, or a model that is built on an `AmortizedEmbeddingBagCollection`, on a CPU, that looks ids up
            in its collection alone.
        folder: the package to make.
        schema: of the requests.
        call: how a model that is no ranker is called; see `ModelRanker`. Of the batch it may read dense inputs.
        dtype: `torch.float32` or `torch.bfloat16`, of encoders and states.
        tables: `int8`, each row with a scale and an offset, or `float32`.
        overwrite: replace a package that is there.
        signing_key: PEM file of an Ed25519 private key, which signs the package; see `load_package`. It needs the extra
            `sign`.

    Returns:
        float: how much a probability of the package differs at most from the model's in float32, in
        `CHECKED_REQUESTS` random requests.

    Raises:
        InputError: the model cannot be exported, the schema does not fit it, the folder cannot be written, or the key
            cannot be read.

    Example::

        export_package(model, "packages/films", schema)
        scorer = AmortizedScorer(load_package("packages/films"))
    """
    if dtype not in _MOST_DIFFERENCE:
        raise InputError(f"dtype is {dtype}, not torch.float32 or torch.bfloat16")
    device = next((weight.device.type for weight in [*model.parameters(), *model.buffers()]), "cpu")
    if device != "cpu":
        raise InputError(f"the model is on {device}, and packages are compiled for CPUs: export model.cpu()")
    sign = signer(signing_key)
    try:
        own, served = serve(model, dtype, "eager", call), serve(model, dtype, "auto", call)
    except ValueError as error:
        raise InputError(f"the model cannot be exported: {error}") from error
    assert isinstance(served.phases, RankerPhases)
    phases: RankerPhases = served.phases
    collection = phases.ranker.collection
    collections = _collections(collection)
    if reason := _why_other_tables(phases.ranker, collections) or _why_not_exportable(collection):
        raise InputError(f"the model cannot be exported: {reason}; serve it by AmortizedScorer itself")
    _refuse_other_sides(served.lookups, schema)
    requests = _some_requests(schema, shortest(served.history_lengths.values()) or CHECKED_REQUESTS)
    in_float32 = AmortizedScorer(model, schema=schema, backend="eager", call=call).score(requests)
    with new_folder(folder, overwrite) as temporary, torch.no_grad():
        program = _compile(phases, collection, schema, temporary)
        table_configs = _save_tables(collections, temporary / TABLES_FILE, tables)
        schema.save(temporary)
        manifest = {
            "package_version": PACKAGE_VERSION,
            "versions": {"python": platform.python_version(), **installed_versions()},
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "dtype": str(dtype).removeprefix("torch."),
            "history_lengths": dict(served.history_lengths),
            "reads": {tower: asdict(reads) for tower, reads in served.lookups.reads.items()},
            "sequence_bags": {name: asdict(bag) for name, bag in served.lookups.sequence_bags.items()},
            **program,
            "tables": table_configs,
        }
        write_manifest(temporary, manifest)
        logits_CT = _checked(temporary, requests, own, dtype)
        write_samples(temporary, schema, requests, logits_CT)
        write_manifest(temporary, manifest)
        sign(temporary)
        return _difference(logits_CT, in_float32)


def _checked(folder: Path, requests: Sequence[Mapping[str, Any]], own: Served, dtype: torch.dtype) -> Tensor:
    """A package's scores of some requests, given as its users do; refused if they are not its model's."""
    package = load_package(folder)
    scores = AmortizedScorer(package).score(requests)
    # What rounding of tables does to scores depends on the model; all else does not.
    with_its_tables = AmortizedScorer(replace(package, phases=own.phases)).score(requests)
    difference, most = _difference(scores, with_its_tables), _MOST_DIFFERENCE[dtype]
    if difference > most:
        raise InputError(
            f"the model cannot be exported: a compiled probability differs by {difference:.1e} from PyTorch's, more "
            f"than {most:.0e}; serve it by AmortizedScorer itself"
        )
    return scores


def _difference(logits: Tensor, others: Tensor) -> float:
    """The greatest of their probabilities."""
    return float((torch.sigmoid(logits) - torch.sigmoid(others)).abs().max())


def _some_requests(schema: RequestSchema, history_length: int) -> list[dict[str, Any]]:
    """Random requests, as mappings, with histories from none to the longest."""
    lengths = [row * history_length // (CHECKED_REQUESTS - 1) for row in range(CHECKED_REQUESTS)]
    requests: list[dict[str, Any]] = random_requests(
        schema, lengths, [1 + row for row in range(CHECKED_REQUESTS)], seed=0
    ).to_pylist()
    return requests


def _refuse_other_sides(lookups: Lookups, schema: RequestSchema) -> None:
    """Refuse a schema that has on another side what the model reads, or has not."""
    side_of = {feature.name: feature.side for feature in schema.features}
    for field, bags in lookups.bags.items():
        side = field.removesuffix("_sparse")
        for feature in bags.table_sizes:
            if (has := side_of.get(feature)) != side:
                where = f"on the {has} side" if has else "on none"
                raise InputError(
                    f"schema {schema.dataset!r}: the model reads {feature!r} on the {side} side, and the schema has it "
                    f"{where}: every request would be refused"
                )


def _collections(collection: AmortizedEmbeddingBagCollection) -> dict[str, nn.Module]:
    """Collections of tables by what reads them."""
    sides = {"request": collection.request_bags, "candidate": collection.candidate_bags}
    bags: dict[str, nn.Module] = {side: bags for side, bags in sides.items() if bags is not None}
    return bags | {f"sequences_{place}": sequences for place, sequences in enumerate(collection.sequences)}


def _why_other_tables(ranker: CollectionRanker, collections: Mapping[str, nn.Module]) -> str | None:
    names = {module: name for name, module in ranker.named_modules()}
    known = {module for collection in collections.values() for module in collection.modules()}
    for module, name in names.items():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection) and module not in known:
            return f"{name} looks ids up outside of its collection"
    for module in collections.values():
        if isinstance(module, SequenceTables):
            (table,) = module.managed.embedding_configs()
            return f"its table {table.name!r} is managed, and packages do not hold which ids have its rows"
        if isinstance(module, EmbeddingBagCollection) and module.is_weighted():
            return "its bags are weighted, and the requests of a schema have no weights"
    # Quantizing copies tables, not what else a collection does.
    reasons = (PLAIN_TABLES.why_not_any(module, names[module]) for module in collections.values())
    return next(filter(None, reasons), None)


def _why_not_exportable(collection: AmortizedEmbeddingBagCollection) -> str | None:
    return next(filter(None, (_why_other_encoder(tower.encoder) for tower in collection.towers)), None)


def _why_other_encoder(encoder: HistoryEncoder) -> str | None:
    if isinstance(encoder, _IN_PYTORCH):
        return None
    if not isinstance(encoder, AmortizedHistoryArch):
        known = ", ".join(kind.__name__ for kind in (AmortizedHistoryArch, *_IN_PYTORCH))
        return f"of history encoders, {known} can be, {type(encoder).__name__} cannot"
    if encoder.reads_itself:
        return "a candidate that reads itself needs an attention that compiled code does not have for an empty history"
    if encoder.compression is not None:
        return "how many rows recent_events leaves of a history is not known when it is compiled"
    return None


def _compile(
    phases: RankerPhases, collection: AmortizedEmbeddingBagCollection, schema: RequestSchema, folder: Path
) -> dict[str, Any]:
    """Compile the phases into a folder; what the manifest tells of them."""
    widths, num_candidates = collection.bags.own_widths, 5
    limits = [tower.event_encoder.max_length for tower in collection.towers]
    num_events = min([6, *(limit for limit in limits if limit is not None)])
    num_dense = schema.num_dense
    head = phases.head(num_dense["request"])
    if head is not None and not head.is_cheaper(1, _USUAL_CANDIDATES):
        head = None
    programs, states, of_one_event, num_keys, items = [], [], [], [], []
    for place, tower in enumerate(collection.towers):
        served, reads = phases.towers[tower.name], collection.bags.reads[tower.name]
        history = _History(served, list(reads.events), beside_pytorch=head is None)
        events = [torch.randn(num_events, _width(collection, tower, *feature)) for feature in reads.events.items()]
        states.append(list(history(events)))
        of_one_event.append(list(history([rows_nW[:1] for rows_nW in events])))
        num_keys.append(served.num_keys())
        longest = tower.event_encoder.max_length
        grows = {} if longest == 1 else {0: Dim("n", min=1, max=longest)}
        programs.append(_save(history, (events,), ([grows for _ in events],), folder / f"history_{place}.pt2"))
        items += [torch.randn(num_candidates, _width(collection, tower, *feature)) for feature in reads.items.items()]
    of_request, of_candidate = phases.request_bags, phases.candidate_bags
    terms = [torch.randn(1, num_dense["request"]), *(torch.randn(1, widths[bag]) for bag in of_request)]
    if head is not None:
        request, given_request = _Request(phases, head), (terms[0], terms[1:])
        terms = list(request(*given_request))
        programs.append(_save(request, given_request, None, folder / "request.pt2"))
    items_of = {tower: list(reads.items) for tower, reads in collection.bags.reads.items()}
    candidates = _Candidates(phases, head, items_of, num_keys)
    bags = [torch.randn(num_candidates, widths[bag]) for bag in of_candidate]
    given = states, terms, torch.randn(num_candidates, num_dense["candidate"]), bags, items
    rows, some = [Dim(f"rows_{place}", min=1) for place in range(len(states))], Dim("m", min=1)
    # A size that grows is the number of events, or that and some more.
    grown: list[list[dict[int, Any]]] = [
        [
            {
                place: of_tower + (size - num_events) if size > num_events else of_tower
                for place, (size, of_one) in enumerate(zip(tensor.shape, one.shape, strict=True))
                if size != of_one
            }
            for tensor, one in zip(state, ones, strict=True)
        ]
        for of_tower, state, ones in zip(rows, states, of_one_event, strict=True)
    ]
    shapes: Any = (grown, [{} for _ in terms], {0: some}, [{0: some} for _ in bags], [{0: some} for _ in items])
    programs.append(_save(candidates, given, shapes, folder / "candidates.pt2"))
    return {
        "operators": load_library() if any(map(_has_operators, programs)) else None,
        "num_request_dense": num_dense["request"],
        "num_candidate_dense": num_dense["candidate"],
        "request_bags": of_request,
        "candidate_bags": of_candidate,
        "has_head": head is not None,
        "num_keys": num_keys,
        "states": [[list(tensor.shape) for tensor in ones] for ones in of_one_event],
        "state_dtypes": [[str(tensor.dtype).removeprefix("torch.") for tensor in ones] for ones in of_one_event],
        "terms": [list(tensor.shape) for tensor in terms],
        "num_tasks": candidates(*given).shape[1],
    }


def _width(collection: AmortizedEmbeddingBagCollection, tower: HistoryTower, feature: str, place: int | None) -> int:
    """Numbers of an entry of a feature, as they are looked up or given."""
    if place is None:
        return tower.numbers[feature]
    configs: Any = collection.sequences[place].embedding_configs
    return next(table.embedding_dim for table in configs() if feature in table.feature_names)


def _has_operators(program: ExportedProgram) -> bool:
    """Whether a program calls operators of this package."""
    targets = (node.target for node in program.graph.nodes)
    return any(isinstance(target, OpOverload) and target.namespace == "torchrec_amort" for target in targets)


def _save(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, path: Path) -> ExportedProgram:
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return program


def _save_tables(collections: dict[str, nn.Module], path: Path, tables: Tables) -> dict[str, Any]:
    """Write all tables, quantized or not; what is needed to make their collections again."""
    quantized = quantize_embeddings(
        nn.ModuleDict(collections),
        dtype=_TABLE_DTYPES[tables],
        inplace=False,
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    save_tables(quantized.state_dict(), path)
    return {name: [_to_record(config) for config in _configs(quantized[name])] for name in collections}


def _configs(collection: nn.Module) -> Sequence[EmbeddingBagConfig | EmbeddingConfig]:
    if isinstance(collection, QuantEmbeddingCollection):
        return collection.embedding_configs()
    assert isinstance(collection, QuantEmbeddingBagCollection)
    return collection.embedding_bag_configs()


def _to_record(config: EmbeddingBagConfig | EmbeddingConfig) -> dict[str, Any]:
    record = {
        "name": config.name,
        "feature_names": list(config.feature_names),
        "num_embeddings": config.num_embeddings,
        "embedding_dim": config.embedding_dim,
        "data_type": config.data_type.value,
    }
    return record | ({"pooling": config.pooling.value} if isinstance(config, EmbeddingBagConfig) else {})
