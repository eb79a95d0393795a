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
from torch.export import Dim
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
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import MeanPooling
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.schema import SCHEMA_FILE, InputError, RequestSchema
from torchrec_amort.serving.heads import Head, Terms, build_head
from torchrec_amort.serving.lookup import PLAIN_TABLES, BagLookup, SequenceLookup, Slots, stack
from torchrec_amort.serving.phases import Phases, ServedDLRM, serve_dlrm, snapshot, why_not_served
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.versions import installed_versions

PACKAGE_VERSION = 1
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

    def __init__(self, event_encoder: EventEncoder, encoder: AmortizableEncoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.event_encoder, self.encoder, self.dtype = event_encoder, encoder.to(dtype), dtype

    def forward(self, events_EnD: Tensor) -> tuple[Tensor, ...]:
        lengths_B = _count(events_EnD[0])
        features = zip(self.event_encoder.features, events_EnD, strict=True)
        events = self.event_encoder({name: JaggedTensor(rows, lengths=lengths_B) for name, rows in features})
        return _to_tensors(self.encoder.encode_history(JaggedTensor(events.values().to(self.dtype), lengths=lengths_B)))


class _Request(nn.Module):
    """A request's dense inputs [1, I_r] and slots [1, F_r, D] to its terms."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.dtype = head.to(dtype), dtype

    def forward(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        return self.head.request(dense_BI.to(self.dtype), slots_BFD.to(self.dtype))


class _Candidates(nn.Module):
    """State, terms, and candidates' items [m, D], dense inputs [m, I_c] and slots [m, F_c, D] to logits [m, T]."""

    def __init__(self, encoder: AmortizableEncoder | None, head: Head, num_layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.head, self.dtype = None if encoder is None else encoder.to(dtype), head.to(dtype), dtype
        self.num_layers = num_layers

    def forward(
        self, state: list[Tensor], terms: list[Tensor], items_CD: Tensor, dense_CI: Tensor, slots_CFD: Tensor
    ) -> Tensor:
        num_candidates_B = _count(items_CD)
        slots_CFD = slots_CFD.to(self.dtype)
        if self.encoder is not None:
            items = JaggedTensor(items_CD.to(self.dtype), lengths=num_candidates_B)
            history_CX = self.encoder.score_candidates(_to_state(state, self.num_layers), items)
            slots_CFD = torch.cat([slots_CFD, history_CX.unflatten(1, (self.encoder.num_slots, -1))], dim=1)
        return self.head.candidates(tuple(terms), num_candidates_B, dense_CI.to(self.dtype), slots_CFD).float()


def _to_tensors(state: HistoryState) -> tuple[Tensor, ...]:
    """Keys of each layer, values of each, and the summary if there is one: contiguous, as compiled code expects."""
    tensors = (*state.keys, *state.values, *(() if state.summary is None else (state.summary,)))
    return tuple(tensor.contiguous() for tensor in tensors)


def _to_state(tensors: Sequence[Tensor], num_keys: int) -> HistoryState:
    """The state of one request; it has `num_keys` keys, and as many values, but one if it has no keys."""
    num_values = max(num_keys, 1)
    values, summary = tensors[num_keys : num_keys + num_values], tensors[num_keys + num_values :]
    return HistoryState(tuple(tensors[:num_keys]), tuple(values), _count(values[0]), summary[0] if summary else None)


def _count(rows: Tensor) -> Tensor:
    """int64 [1]: the number of rows, of which there is one at least."""
    # Inductor takes torch.full of a number that it does not know for a constant.
    return torch.arange(1, rows.shape[0] + 1)[-1:]


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
    head = build_head(model, len(schema.of("request", "dense")))
    with new_folder(folder, overwrite) as temporary, torch.no_grad():
        phases = _compile(model, head, dtype, temporary)
        table_configs = _save_tables(model, temporary / TABLES_FILE, tables)
        (temporary / SCHEMA_FILE).write_text(schema.to_json(), encoding="utf-8")
        write_json(
            temporary / MANIFEST_FILE,
            {
                "package_version": PACKAGE_VERSION,
                "versions": {"python": platform.python_version(), **installed_versions()},
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "dtype": str(dtype).removeprefix("torch."),
                "num_request_dense": head.num_request_dense,
                "num_candidate_dense": head.num_candidate_dense,
                "embedding_dim": head.embedding_dim,
                "event_features": [] if model.event_encoder is None else model.event_encoder.features,
                "history_length": None if model.event_encoder is None else model.event_encoder.max_length,
                **phases,
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


def _compile(model: AmortizedDLRM, head: Head, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Compile the phases into a folder; what the manifest tells of them."""
    encoder = model.history_arch if isinstance(model.history_arch, AmortizableEncoder) else None
    dim, num_events, num_candidates = head.embedding_dim, 6, 5
    num_request_slots = 0 if model.request_sparse_arch is None else model.request_sparse_arch.F
    state: tuple[Tensor, ...] = ()
    num_keys = 0
    if encoder is not None:
        assert model.event_encoder is not None
        history = _History(model.event_encoder, encoder, dtype)
        events = torch.randn(len(model.event_encoder.features), num_events, dim)
        state = history(events)
        num_keys = len(encoder.encode_history(_no_events(dim, dtype)).keys)
        _save(history, (events,), ({1: Dim("n", min=1, max=model.event_encoder.max_length)},), folder / "history.pt2")
    request = _Request(head, dtype)
    of_request = torch.randn(1, head.num_request_dense), torch.randn(1, num_request_slots, dim)
    terms = request(*of_request)
    _save(request, of_request, None, folder / "request.pt2")
    candidates = _Candidates(encoder, head, num_keys, dtype)
    given = (
        list(state),
        list(terms),
        torch.randn(num_candidates, dim),
        torch.randn(num_candidates, head.num_candidate_dense),
        torch.randn(num_candidates, model.sparse_arch.F, dim),
    )
    rows, some = Dim("rows", min=1), Dim("m", min=1)
    grows: list[dict[int, Dim]] = [{0: rows} if tensor.shape[0] == num_events else {} for tensor in state]
    shapes: Any = (grows, [{} for _ in terms], {0: some}, {0: some}, {0: some})
    _save(candidates, given, shapes, folder / "candidates.pt2")
    return {
        "num_keys": num_keys,
        "state": [list(tensor.shape[1:]) for tensor in state],
        "terms": [list(tensor.shape) for tensor in terms],
        "num_candidate_slots": model.sparse_arch.F,
        "num_request_slots": num_request_slots,
        "num_tasks": candidates(*given).shape[1],
    }


def _no_events(dim: int, dtype: torch.dtype) -> JaggedTensor:
    return JaggedTensor(torch.empty(0, dim, dtype=dtype), lengths=torch.zeros(1, dtype=torch.int64))


def _save(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, path: Path) -> None:
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


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
        InputError: it is no package, or of a newer version; a file is missing or damaged; it was compiled for another
            processor.

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
    if package_version > PACKAGE_VERSION:
        raise InputError(f"{path}: package_version is {package_version}, this torchrec-amort reads {PACKAGE_VERSION}")
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
    return manifest


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
    """What a package's phases take and give."""

    num_keys: int
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
        return _to_state([torch.zeros(1, *shape, dtype=dtype) for shape in shapes], self._shapes.num_keys)

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
                state = list(_to_tensors(of_each[row])) if of_each else []
                of_request = [term[row : row + 1].contiguous() for term in terms]
                given = (items_mD.contiguous(), dense_mI.contiguous(), slots_mFD.contiguous())
                logits.append(self._candidates(state, of_request, *given))
        return torch.cat(logits)
