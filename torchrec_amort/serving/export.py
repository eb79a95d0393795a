"""Packages: a model as files that serve without its code, in Python and C++.

A package is a folder: `history.pt2`, `request.pt2` and `candidates.pt2`, AOTInductor's compiled phases for one request
with any number of events and candidates; `tables.pt`, the embedding tables, quantized to int8 or not; `schema.json`;
and `manifest.json`, which tells versions, shapes and checksums.

Shape suffixes: n events and m candidates of the one request; I dense inputs; D embedding dimension; F slots; E features
of an event; H attention heads of dimension K; S history vectors of a candidate; T tasks.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torchrec import EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.data.sample import random_requests
from torchrec_amort.files import new_folder, write_json
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import MeanPooling
from torchrec_amort.ops.native import EmbeddingRows, load_library, why_no_build
from torchrec_amort.schema import SCHEMA_FILE, InputError, RequestSchema
from torchrec_amort.serving.heads import Terms
from torchrec_amort.serving.lookup import PLAIN_TABLES, BagLookup, SequenceLookup, Slots, stack
from torchrec_amort.serving.native_encoder import NativeEncoder, NativeState
from torchrec_amort.serving.phases import ModelPhases, Phases, ServedDLRM, serve_dlrm, snapshot, why_not_served
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.versions import installed_versions

PACKAGE_VERSION = 2
MANIFEST_FILE = "manifest.json"
TABLES_FILE = "tables.pt"
Tables = Literal["int8", "float32"]
_TABLE_DTYPES = {"int8": torch.qint8, "float32": torch.float32}
CHECKED_REQUESTS = 20
# How much probabilities of a package may differ from those of PyTorch with the same tables: compiled code adds up in
# another order, and rounds to 8 bits in other places. More than this is another function.
_MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class _History(nn.Module):
    """Events' embeddings [E, n, D] to the tensors of their state."""

    def __init__(self, phases: ModelPhases) -> None:
        super().__init__()
        assert phases.event_encoder is not None
        assert phases.encoder is not None
        self.event_encoder, self.encoder = phases.event_encoder, phases.encoder
        self.dtype = torch.float32 if isinstance(phases.encoder, NativeEncoder) else phases.dtype

    def forward(self, events_EnD: Tensor) -> tuple[Tensor, ...]:
        lengths_B = _count(events_EnD.shape[1])
        features = zip(self.event_encoder.features, events_EnD, strict=True)
        events = self.event_encoder({name: JaggedTensor(rows, lengths=lengths_B) for name, rows in features})
        return _to_tensors(self.encoder.encode_history(JaggedTensor(events.values().to(self.dtype), lengths=lengths_B)))


class _Request(nn.Module):
    """A request's dense inputs [1, I_r] and slots [1, F_r, D] to its terms."""

    def __init__(self, phases: ModelPhases) -> None:
        super().__init__()
        self.phases, self.parts = phases, _parts(phases)

    def forward(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        return self.phases.terms(dense_BI, _unstack(slots_BFD))


class _Candidates(nn.Module):
    """State, terms, and candidates' items [m, D], dense inputs [m, I_c] and slots [m, F_c, D] to logits [m, T]."""

    def __init__(self, phases: ModelPhases, num_keys: int | None) -> None:
        super().__init__()
        self.phases, self.parts, self.num_keys = phases, _parts(phases), num_keys

    def forward(
        self, state: list[Tensor], terms: list[Tensor], items_CD: Tensor, dense_CI: Tensor, slots_CFD: Tensor
    ) -> Tensor:
        states = [_to_state(state, self.num_keys)] if state else []
        num_candidates_B = _count(items_CD.shape[0])
        items = EmbeddingRows(items_CD)
        return self.phases.score(states, tuple(terms), items, num_candidates_B, dense_CI, _unstack(slots_CFD))


def _parts(phases: ModelPhases) -> nn.ModuleList:
    """The modules of phases, whose weights an exported one has."""
    return nn.ModuleList(part for part in vars(phases).values() if isinstance(part, nn.Module))


def _unstack(slots_RFD: Tensor) -> list[EmbeddingRows]:
    return [EmbeddingRows(rows_RD) for rows_RD in slots_RFD.unbind(1)]


def _to_tensors(state: HistoryState) -> tuple[Tensor, ...]:
    """Keys of each layer, values of each, and the summary if there is one: contiguous, as compiled code expects.

    Of native code, keys and values of all layers.
    """
    if isinstance(state, NativeState):
        return state.tensors()
    tensors = (*state.keys, *state.values, *(() if state.summary is None else (state.summary,)))
    return tuple(tensor.contiguous() for tensor in tensors)


def _to_state(tensors: Sequence[Tensor], num_keys: int | None) -> HistoryState:
    """The state of one request; it has `num_keys` keys, and as many values, but one if it has no keys.

    None is of native code.
    """
    if num_keys is None:
        return NativeState.of_tensors(tensors[0], tensors[1], _count(tensors[0].shape[2]))
    num_values = max(num_keys, 1)
    values, summary = tensors[num_keys : num_keys + num_values], tensors[num_keys + num_values :]
    lengths = _count(values[0].shape[0])
    return HistoryState(tuple(tensors[:num_keys]), tuple(values), lengths, summary[0] if summary else None)


def _count(rows: int) -> Tensor:
    """int64 [1]: the number of rows, of which there is one at least."""
    # Inductor takes torch.full of a number that it does not know for a constant.
    return torch.arange(1, rows + 1)[-1:]


def export_package(
    model: AmortizedDLRM,
    folder: str | Path,
    schema: RequestSchema,
    *,
    dtype: torch.dtype = torch.float32,
    tables: Tables = "int8",
    overwrite: bool = False,
) -> float:
    """Write a model as a package, whole or not at all: it has been loaded and has scored requests of the schema.

    Args:
        model: an `AmortizedDLRM`, or what `attach_history` returned, on a CPU, with an amortizable encoder or none.
        folder: the package to make.
        schema: of the requests.
        dtype: `torch.float32` or `torch.bfloat16`, of dense weights and states.
        tables: `int8`, each row with a scale and an offset, or `float32`.
        overwrite: replace a package that is there.

    Returns:
        float: how much a probability of the package differs at most from the model's in float32, in
        `CHECKED_REQUESTS` random requests.

    Raises:
        InputError: the model cannot be exported, the schema does not fit it, or the folder cannot be written.

    Example::

        export_package(model, "packages/films", schema)
        scorer = AmortizedScorer(load_package("packages/films"))
    """
    if dtype not in _MOST_DIFFERENCE:
        raise InputError(f"dtype is {dtype}, not torch.float32 or torch.bfloat16")
    if reason := why_not_served(model):
        raise InputError(f"the model cannot be exported: {reason}")
    if (device := next(model.parameters()).device.type) != "cpu":
        raise InputError(f"the model is on {device}, and packages are compiled for CPUs: export model.cpu()")
    if reason := _why_other_tables(model) or _why_not_exportable(model):
        raise InputError(f"the model cannot be exported: {reason}; serve it by AmortizedScorer itself")
    own = serve_dlrm(model, dtype, "eager")
    _refuse_other_sides(own, schema)
    requests = _some_requests(schema, own.history_length or CHECKED_REQUESTS)
    in_float32 = AmortizedScorer(model, schema=schema, backend="eager").score(requests)
    model = snapshot(model)
    phases = ModelPhases(model, len(schema.of("request", "dense")), dtype, "auto")
    with new_folder(folder, overwrite) as temporary, torch.no_grad():
        shapes = _compile(model, phases, temporary)
        table_configs = _save_tables(model, temporary / TABLES_FILE, tables)
        (temporary / SCHEMA_FILE).write_text(schema.to_json(), encoding="utf-8")
        write_json(
            temporary / MANIFEST_FILE,
            {
                "package_version": PACKAGE_VERSION,
                "versions": {"python": platform.python_version(), **installed_versions()},
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "dtype": str(dtype).removeprefix("torch."),
                "num_request_dense": phases.num_request_dense,
                "num_candidate_dense": phases.num_candidate_dense,
                "embedding_dim": phases.head.embedding_dim,
                "event_features": [] if model.event_encoder is None else model.event_encoder.features,
                "history_length": None if model.event_encoder is None else model.event_encoder.max_length,
                **shapes,
                "tables": table_configs,
                "sha256": {path.name: _checksum(path) for path in sorted(temporary.iterdir())},
            },
        )
        return _difference(_checked(temporary, requests, own, dtype), in_float32)


def _checked(folder: Path, requests: Sequence[Mapping[str, Any]], own: ServedDLRM, dtype: torch.dtype) -> Tensor:
    """A package's scores of some requests, given as its users do; refused if they are not its model's."""
    package = load_package(folder)
    scores = AmortizedScorer(package).score(requests)
    # What rounding of tables does to scores depends on the model; all else does not.
    with_its_tables = AmortizedScorer(replace(package, phases_of=own.phases_of)).score(requests)
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


def _refuse_other_sides(served: ServedDLRM, schema: RequestSchema) -> None:
    """Refuse a schema that has on another side what the model reads, or has not."""
    side_of = {feature.name: feature.side for feature in schema.features}
    for side, lookup in (("candidate", served.candidate_bags), ("request", served.request_bags)):
        for feature in () if lookup is None else lookup.table_sizes:
            if (has := side_of.get(feature)) != side:
                where = f"on the {has} side" if has else "on none"
                raise InputError(
                    f"schema {schema.dataset!r}: the model reads {feature!r} on the {side} side, and the schema has it "
                    f"{where}: every request would be refused"
                )
    num_dense = {side: len(schema.of(side, "dense")) for side in ("request", "candidate")}
    phases = served.phases_of(num_dense["request"])
    if phases.num_candidate_dense != num_dense["candidate"]:
        raise InputError(
            f"schema {schema.dataset!r}: the model reads {phases.num_candidate_dense} dense features on the candidate "
            f"side, and the schema has {num_dense['candidate']} there and {num_dense['request']} on the request side: "
            "every request would be refused"
        )


def _why_other_tables(model: AmortizedDLRM) -> str | None:
    if isinstance(model.history_embedding_collection, SequenceTables):
        return "its table of items is managed, and packages do not hold which ids have its rows"
    if any(model.is_weighted.values()):
        return "its bags are weighted, and the requests of a schema have no weights"
    # Quantizing copies tables, not what else a collection does.
    names = {module: name for name, module in model.named_modules()}
    reasons = (PLAIN_TABLES.why_not_any(collection, names[collection]) for collection in _collections(model).values())
    return next(filter(None, reasons), None)


def _why_not_exportable(model: AmortizedDLRM) -> str | None:
    encoder = model.history_arch
    if encoder is None or isinstance(encoder, MeanPooling):
        return None
    if not isinstance(encoder, AmortizedHistoryArch):
        return f"of history encoders, AmortizedHistoryArch and MeanPooling can be, {type(encoder).__name__} cannot"
    if encoder.reads_itself:
        return "a candidate that reads itself needs an attention that compiled code does not have for an empty history"
    if encoder.compression is not None:
        return "how many rows recent_events leaves of a history is not known when it is compiled"
    return None


def _checksum(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def _compile(model: AmortizedDLRM, phases: ModelPhases, folder: Path) -> dict[str, Any]:
    """Compile the phases into a folder; what the manifest tells of them."""
    dim, num_events, num_candidates = phases.head.embedding_dim, 6, 5
    num_request_slots = 0 if model.request_sparse_arch is None else model.request_sparse_arch.F
    state: tuple[Tensor, ...] = ()
    of_one_event: tuple[Tensor, ...] = ()
    num_keys: int | None = 0
    programs = []
    if phases.encoder is not None:
        assert phases.event_encoder is not None
        history = _History(phases)
        events = torch.randn(len(phases.event_encoder.features), num_events, dim)
        state, of_one_event = history(events), history(events[:, :1])
        is_native = isinstance(phases.encoder, NativeEncoder)
        num_keys = None if is_native else len(phases.encoder.encode_history(_no_events(dim, phases.dtype)).keys)
        grows: Any = ({1: Dim("n", min=1, max=phases.event_encoder.max_length)},)
        programs.append(_save(history, (events,), grows, folder / "history.pt2"))
    request = _Request(phases)
    of_request = torch.randn(1, phases.num_request_dense), torch.randn(1, num_request_slots, dim)
    terms = request(*of_request)
    programs.append(_save(request, of_request, None, folder / "request.pt2"))
    candidates = _Candidates(phases, num_keys)
    given = (
        list(state),
        list(terms),
        torch.randn(num_candidates, dim),
        torch.randn(num_candidates, phases.num_candidate_dense),
        torch.randn(num_candidates, model.sparse_arch.F, dim),
    )
    rows, some = Dim("rows", min=1), Dim("m", min=1)
    # A size that grows is the number of events, or that and some more.
    states: list[dict[int, Any]] = [
        {
            place: rows + (size - num_events) if size > num_events else rows
            for place, (size, of_one) in enumerate(zip(tensor.shape, one.shape, strict=True))
            if size != of_one
        }
        for tensor, one in zip(state, of_one_event, strict=True)
    ]
    shapes: Any = (states, [{} for _ in terms], {0: some}, {0: some}, {0: some})
    programs.append(_save(candidates, given, shapes, folder / "candidates.pt2"))
    return {
        "operators": load_library() if any(map(_has_operators, programs)) else None,
        "num_keys": num_keys,
        "state": [list(tensor.shape) for tensor in of_one_event],
        "terms": [list(tensor.shape) for tensor in terms],
        "num_candidate_slots": model.sparse_arch.F,
        "num_request_slots": num_request_slots,
        "num_tasks": candidates(*given).shape[1],
    }


def _no_events(dim: int, dtype: torch.dtype) -> JaggedTensor:
    return JaggedTensor(torch.empty(0, dim, dtype=dtype), lengths=torch.zeros(1, dtype=torch.int64))


def _has_operators(program: ExportedProgram) -> bool:
    """Whether a program calls operators of this package."""
    targets = (node.target for node in program.graph.nodes)
    return any(isinstance(target, OpOverload) and target.namespace == "torchrec_amort" for target in targets)


def _save(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, path: Path) -> ExportedProgram:
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return program


def _save_tables(model: AmortizedDLRM, path: Path, tables: Tables) -> dict[str, Any]:
    """Write all tables, quantized or not; what is needed to make their collections again."""
    collections = _collections(model)
    quantized = quantize_embeddings(
        nn.ModuleDict(collections),
        dtype=_TABLE_DTYPES[tables],
        inplace=False,
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    torch.save(quantized.state_dict(), path)
    return {side: [_to_record(config) for config in _configs(quantized[side])] for side in collections}


def _collections(model: AmortizedDLRM) -> dict[str, nn.Module]:
    """Collections of tables by side."""
    collections: dict[str, nn.Module] = {"candidate": model.sparse_arch.embedding_bag_collection}
    if model.request_sparse_arch is not None:
        collections["request"] = model.request_sparse_arch.embedding_bag_collection
    if model.history_embedding_collection is not None:
        collections["sequences"] = model.history_embedding_collection
    return collections


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


def load_package(folder: str | Path) -> ServedDLRM:
    """Open a package, to be given to `AmortizedScorer`.

    Its checksums tell a damaged package from a whole one, not a good one from an evil one: it is code, to be loaded
    from who is trusted.

    Args:
        folder: what `export_package` wrote.

    Raises:
        InputError: it is no package, or of another version; a file is missing or damaged; it was compiled for another
            processor, or needs operators that were not built here.

    Example::

        scorer = AmortizedScorer(load_package("packages/films"), microbatch_size=512)
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    schema = RequestSchema.load(folder)
    tables, bags, sequences = manifest["tables"], {}, None
    weights = torch.load(folder / TABLES_FILE, weights_only=True)
    device = torch.device("cpu")
    for side in tables.keys() & {"candidate", "request"}:
        configs = [_from_record(EmbeddingBagConfig, record) for record in tables[side]]
        bags[side] = QuantEmbeddingBagCollection(tables=configs, is_weighted=False, device=device)
        bags[side].load_state_dict(_under(weights, side))
    if "sequences" in tables:
        configs = [_from_record(EmbeddingConfig, record) for record in tables["sequences"]]
        sequences = QuantEmbeddingCollection(tables=configs, device=device)
        sequences.load_state_dict(_under(weights, "sequences"))
    phases = _PackagedPhases(folder, manifest)
    return ServedDLRM(
        candidate_bags=BagLookup(bags["candidate"]),
        request_bags=BagLookup(bags["request"]) if "request" in bags else None,
        sequences=None if sequences is None else SequenceLookup(sequences),
        event_features=tuple(manifest["event_features"]),
        history_length=manifest["history_length"],
        phases_of=lambda _: phases,
        schema=schema,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file: {folder} is no package (torchrec-amort export --help)")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        package_version, checksums, cpu = manifest["package_version"], manifest["sha256"], manifest["cpu"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the manifest of a package ({error}): export it again") from error
    if package_version != PACKAGE_VERSION:
        told = f"{path}: package_version is {package_version}, this torchrec-amort reads {PACKAGE_VERSION}"
        raise InputError(f"{told}: export the model again")
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file: the package is not whole, export or copy it again")
        if (have := _checksum(folder / name)) != expected:
            raise InputError(
                f"{folder / name}: checksum is {have[:12]}..., the manifest says {expected[:12]}...: the file is "
                "damaged, export or copy it again"
            )
    if cpu != torch.backends.cpu.get_cpu_capability():
        raise InputError(
            f"{path}: compiled for {cpu}, but this processor's capability is "
            f"{torch.backends.cpu.get_cpu_capability()}: export it on such a machine"
        )
    if manifest["operators"] is not None and (reason := _why_no_operators(getattr(torch, manifest["dtype"]))):
        raise InputError(f"{path}: it needs the operators of {manifest['operators']}, which are not here: {reason}")
    return manifest


def _why_no_operators(dtype: torch.dtype) -> str | None:
    try:
        return why_no_build(torch.empty(0), dtype)
    except RuntimeError as error:
        return str(error)


def _from_record(kind: type[Any], record: Mapping[str, Any]) -> Any:
    fields = dict(record) | {"data_type": DataType(record["data_type"])}
    if "pooling" in record:
        fields["pooling"] = PoolingType(record["pooling"])
    return kind(**fields)


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): weight for name, weight in weights.items() if name.startswith(f"{prefix}.")
    }


@dataclass(frozen=True)
class _Shapes:
    """What a package's phases take and give; `state` is of one event."""

    num_keys: int | None
    state: list[list[int]]
    dtype: torch.dtype


class _PackagedPhases(Phases):
    """The compiled phases of a package, request by request."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(manifest["num_request_dense"], manifest["num_candidate_dense"], is_extendable=False)
        dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._shapes = _Shapes(manifest["num_keys"], manifest["state"], dtype)
        self._features: list[str] = manifest["event_features"]
        self._embedding_dim: int = manifest["embedding_dim"]
        open_: Any = lambda name: torch._inductor.aoti_load_package(str(folder / name))  # noqa: E731
        self._history = open_("history.pt2") if self._shapes.state else None
        self._request, self._candidates = open_("request.pt2"), open_("candidates.pt2")

    def encode(self, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories."""
        rows = torch.stack([events[feature].tensor() for feature in self._features])
        states = [self._encode(events_EnD) for events_EnD in rows.split(lengths_B.tolist(), dim=1)]
        return states[0] if len(states) == 1 else HistoryState.cat(states)

    def _encode(self, events_EnD: Tensor) -> HistoryState:
        if events_EnD.shape[1] > 0:
            assert self._history is not None
            return _to_state(self._history(events_EnD.contiguous()), self._shapes.num_keys)
        # Compiled attention does not take zero keys: a value that is zero adds exactly zero, too.
        shapes, dtype = self._shapes.state, self._shapes.dtype
        return _to_state([torch.zeros(shape, dtype=dtype) for shape in shapes], self._shapes.num_keys)

    def _tensors(self, state: HistoryState) -> list[Tensor]:
        is_native = self._shapes.num_keys is None
        return list(_to_tensors(NativeState.of(state, self._shapes.dtype) if is_native else state))

    def terms(self, dense_BI: Tensor, slots: Slots) -> Terms:
        """Phase one of all else."""
        slots_BFD = stack(slots, self._embedding_dim, dense_BI)
        dense_BI = dense_BI[:, : self.num_request_dense]
        rows = [self._request(dense_BI[row : row + 1], slots_BFD[row : row + 1]) for row in range(dense_BI.shape[0])]
        return tuple(torch.cat(term) for term in zip(*rows, strict=True))

    def score(
        self,
        states: Sequence[HistoryState],
        terms: Terms,
        items: EmbeddingRows | None,
        num_candidates_B: Tensor,
        dense_CI: Tensor,
        slots: Slots,
    ) -> Tensor:
        """Phase two; see `Phases.score`."""
        counts = num_candidates_B.tolist()
        of_each = [state[row] for state in states for row in range(len(state))]
        slots_CFD = stack(slots, self._embedding_dim, dense_CI)
        items_CD = slots_CFD[:, 0] if items is None else items.tensor()
        parts = zip(items_CD.split(counts), dense_CI.split(counts), slots_CFD.split(counts), strict=True)
        logits = []
        for row, (items_mD, dense_mI, slots_mFD) in enumerate(parts):
            if counts[row] > 0:
                state = self._tensors(of_each[row]) if of_each else []
                of_request = [term[row : row + 1].contiguous() for term in terms]
                given = (items_mD.contiguous(), dense_mI.contiguous(), slots_mFD.contiguous())
                logits.append(self._candidates(state, of_request, *given))
        return torch.cat(logits)
