"""Packages: a model as files that serve without its code, in Python and C++.

A package is a folder: `history_0.pt2` and so on, one for each tower, `request.pt2` if there is a head that folds
requests in, and `candidates.pt2`, AOTInductor's compiled phases for one request with any number of events and
candidates; `tables.pt`, the embedding tables, quantized to int8 or not; `schema.json`; and `manifest.json`, which tells
versions, shapes and checksums; `samples.parquet`, requests and the scores that they have to have; `manifest.sig`, if it
was signed (`signing.py`).

Shape suffixes: B requests; N events and C candidates, all requests together; n events and m candidates of one request;
I dense inputs; W widths of tables and bags; T tasks.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.models.bags import Reads, SequenceBag
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.modules.tower import CANDIDATE_ITEM, refuse_other_numbers
from torchrec_amort.ops.native import why_no_build
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.lookup import BagLookup, Embeddings, Lookups, SequenceLookup
from torchrec_amort.serving.mapped import Files, FilesInFolder, MappedTables, Tables
from torchrec_amort.serving.native_encoder import NativeState
from torchrec_amort.serving.phases import Histories, Phases, RequestTerms
from torchrec_amort.serving.samples import SAMPLES_FILE, refuse_other_scores
from torchrec_amort.serving.served import Served
from torchrec_amort.stores import local_path

PACKAGE_VERSION = 4
# Of probabilities of samples: other numbers of threads add up in another order.
_MOST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 1e-2}
# Packages of it are read, too.
_FIRST_OF_RANKERS = 3
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
TABLES_FILE = "tables.pt"
DELTA_FILE = "delta.json"
# Collections of bags; all others are of sequences.
_SIDES = ("request", "candidate")
_Value = TypeVar("_Value")


def load_package(folder: str | Path, mapped: Path | None = None, *, trusted_key: str | Path | None = None) -> Served:
    """Open a package, to be given to `AmortizedScorer`.

    Its checksums tell a damaged package from a whole one, not a good one from an evil one: it is code, to be loaded
    from who is trusted. Its signature tells who that is, provided that nobody changes its files while it is opened.

    Args:
        folder: what `export_package` wrote.
        mapped: a folder, best one in memory such as on /dev/shm, where processes that open the same package have its
            tables once; each has its own if None.
        trusted_key: PEM file of Ed25519 public keys, of which one has to have signed the package: it is refused before
            anything of it is loaded otherwise. Any package is opened if None. It needs the extra `sign`.

    Raises:
        InputError: it is no package, or of another version; a file is missing or damaged; it was compiled for another
            processor, needs operators that were not built here, or scores its samples otherwise than when it was made;
            with `trusted_key`, it is not signed by such a key, or has a file that its manifest does not have.

    Example::

        scorer = AmortizedScorer(load_package("packages/films"), microbatch_size=512)
    """
    files_of = None if mapped is None else lambda checksum: FilesInFolder(mapped / checksum)
    served, _ = read_package(folder, files_of, trusted_key=trusted_key).load()
    return served


@dataclass(frozen=True, eq=False)
class Package:
    """The files of a package, which are what its manifest says: in one folder, or in those of a delta and its base.

    Args:
        folder: which it is named by.
        manifest: what it tells.
        checksum: of the manifest's file, which tells the package from all others.
        paths: of each file but the tables, by its name in the package.
        fill: lets a collection have its tables, given its name.
        mapped: files in memory that its tables are in, or will be; None if they are each collection's own.
    """

    folder: Path
    manifest: Mapping[str, Any]
    checksum: str
    paths: Mapping[str, Path]
    fill: Callable[[Tables, str], None]
    mapped: MappedTables | None

    def tables(self, name: str) -> Tables:
        """A collection of its tables.

        Args:
            name: of the collection.

        Raises:
            InputError: there is no room for it.
        """
        tables = make_tables(self.manifest, name)
        self.fill(tables, name)
        return tables

    def load(self) -> tuple[Served, Package]:
        """Load it, and let it score its samples.

        Returns:
            tuple: what is given to `AmortizedScorer`, and the package, which knows no more how its tables were made, so
            that nothing of that stays in memory.

        Raises:
            InputError: as `load_package`.
        """
        with _in_one_folder(self.paths) as folder:
            schema = RequestSchema.load(folder)
            tables = {name: self.tables(name) for name in self.manifest["tables"]}
            served = _served(self.manifest, folder, schema, tables)
            if SAMPLES_FILE in self.manifest["sha256"]:
                refuse_other_scores(served, folder, _MOST_DIFFERENCE[self.manifest["dtype"]], told=self.folder)
        return served, self if self.mapped is None else replace(self, fill=self.mapped.map)


def read_package(
    folder: str | Path,
    files_of: Callable[[str], Files] | None = None,
    *,
    trusted_key: str | Path | None = None,
) -> Package:
    """Read and verify a package, without loading anything of it.

    Args:
        folder: what `export_package` wrote.
        files_of: files in memory for the tables of a checksum; see `Package.mapped`.
        trusted_key: see `load_package`.

    Raises:
        InputError: see `load_package`.

    Example::

        served, _ = read_package("packages/films").load()
    """
    # A link that is turned to another package meanwhile must not mix the two.
    folder = local_path(folder).resolve()
    content = read_content(folder, trusted_key)
    manifest = parse_manifest(folder, content)
    _refuse_other_files(folder, manifest, is_signed=trusted_key is not None)
    weights = cache(lambda: torch.load(folder / TABLES_FILE, weights_only=True, mmap=True))
    mapped = None if files_of is None else MappedTables(files_of(manifest["sha256"][TABLES_FILE]))

    def fill(tables: Tables, name: str) -> None:
        if mapped is None:
            tables.load_state_dict(under(weights(), name))
        else:
            mapped.fill(tables, name, lambda: under(weights(), name))

    paths = {name: folder / name for name in manifest["sha256"] if name != TABLES_FILE}
    return Package(folder, manifest, hashlib.sha256(content).hexdigest(), paths, fill, mapped)


def make_tables(manifest: Mapping[str, Any], name: str) -> Tables:
    """A collection of a package's tables, not filled yet, in eval mode.

    Args:
        manifest: of the package.
        name: of the collection.
    """
    records, device = manifest["tables"][name], torch.device("cpu")
    # Lookups read a copy of a collection in training mode, whose tables are not in the mapped files.
    if name in _SIDES:
        bags = [_from_record(EmbeddingBagConfig, record) for record in records]
        return QuantEmbeddingBagCollection(tables=bags, is_weighted=False, device=device).eval()
    configs = [_from_record(EmbeddingConfig, record) for record in records]
    return QuantEmbeddingCollection(tables=configs, device=device).eval()


@contextmanager
def _in_one_folder(paths: Mapping[str, Path]) -> Iterator[Path]:
    """A folder of links to the files of a package, for what reads them by their names."""
    with tempfile.TemporaryDirectory(prefix="torchrec-amort-") as folder:
        for name, path in paths.items():
            (Path(folder) / name).symlink_to(path)
        yield Path(folder)


def _served(manifest: Mapping[str, Any], folder: Path, schema: RequestSchema, tables: Mapping[str, Tables]) -> Served:
    """What answers, of files in a folder and of tables."""
    bags = {side: BagLookup(tables[side], side) for side in _SIDES if side in tables}
    names = [f"sequences_{place}" for place in range(len(tables) - len(bags))]
    reads = {tower: Reads(**of_tower) for tower, of_tower in manifest["reads"].items()}
    sequence_bags = {name: SequenceBag(**bag) for name, bag in manifest["sequence_bags"].items()}
    return Served(
        Lookups(
            bags.get("request"),
            bags.get("candidate"),
            [SequenceLookup(tables[name], name) for name in names],
            reads,
            sequence_bags,
        ),
        _PackagedPhases(folder, manifest, schema),
        manifest["history_lengths"],
        torch.device("cpu"),
        schema,
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a package, with checksums of all files that are there.

    Args:
        folder: of the package.
        manifest: all else that it tells.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name not in (MANIFEST_FILE, SIGNATURE_FILE)]
    write_json(folder / MANIFEST_FILE, {**manifest, "sha256": {path.name: checksum(path) for path in paths}})


def signer(signing_key: str | Path | None, of: str = MANIFEST_FILE) -> Callable[[Path], None]:
    """What signs the package in a folder.

    Args:
        signing_key: PEM file of an Ed25519 private key; nothing is signed if None.
        of: the file of the folder that is signed; `DELTA_FILE` of a delta.

    Raises:
        InputError: it cannot be read, or is another kind of key.
    """
    if signing_key is None:
        return lambda _: None
    from torchrec_amort.serving.signing import read_signing_key, sign  # noqa: PLC0415 - of the extra `sign`

    key = read_signing_key(signing_key)
    return lambda folder: sign(folder / of, key)


def read_manifest(folder: Path, trusted_key: str | Path | None = None) -> dict[str, Any]:
    """The manifest of a package, once its files are what it says.

    Args:
        folder: of the package.
        trusted_key: see `load_package`.

    Raises:
        InputError: as `load_package`.
    """
    manifest = parse_manifest(folder, read_content(folder, trusted_key))
    _refuse_other_files(folder, manifest, is_signed=trusted_key is not None)
    return manifest


def read_content(folder: Path, trusted_key: str | Path | None) -> bytes:
    """The bytes of a package's manifest, once it is known who has signed them.

    Args:
        folder: of the package.
        trusted_key: see `load_package`.

    Raises:
        InputError: as `load_package`.
    """
    path = folder / MANIFEST_FILE
    if (folder / DELTA_FILE).is_file():
        raise InputError(
            f"{folder}: has what changed since another package: make the package of both first (torchrec-amort apply)"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file: {folder} is no package (torchrec-amort export --help)")
    content = path.read_bytes()
    if trusted_key is not None:
        from torchrec_amort.serving.signing import refuse_unsigned  # noqa: PLC0415 - of the extra `sign`

        refuse_unsigned(path, content, trusted_key)
    return content


def parse_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    """What a manifest tells, as one of today's.

    Args:
        folder: of the package, or of a delta that makes it.
        content: of the manifest's file.

    Raises:
        InputError: it is no manifest, or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(content)
        package_version, _, _ = manifest["package_version"], manifest["sha256"], manifest["cpu"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the manifest of a package ({error}): export it again") from error
    if package_version not in (_FIRST_OF_RANKERS, PACKAGE_VERSION):
        told = f"{path}: package_version is {package_version}, this torchrec-amort reads {PACKAGE_VERSION}"
        raise InputError(f"{told}: export the model again")
    return _renewed(manifest) if package_version == _FIRST_OF_RANKERS else manifest


def _refuse_other_files(folder: Path, manifest: Mapping[str, Any], *, is_signed: bool) -> None:
    """Refuse a package whose files are not what its manifest says, or that does not run here."""
    refuse_damaged(folder, manifest["sha256"])
    if is_signed:
        refuse_unlisted(folder, (*manifest["sha256"], MANIFEST_FILE, SIGNATURE_FILE))
    refuse_other_machine(folder, manifest)


def refuse_other_machine(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a package that does not run here.

    Args:
        folder: of the package, or of a delta that makes it.
        manifest: what it tells.

    Raises:
        InputError: it was compiled for another processor, or needs operators that were not built here.
    """
    path = folder / MANIFEST_FILE
    if manifest["cpu"] != torch.backends.cpu.get_cpu_capability():
        raise InputError(
            f"{path}: compiled for {manifest['cpu']}, but this processor's capability is "
            f"{torch.backends.cpu.get_cpu_capability()}: export it on such a machine"
        )
    if manifest["operators"] is not None and (reason := _why_no_operators(getattr(torch, manifest["dtype"]))):
        raise InputError(f"{path}: it needs the operators of {manifest['operators']}, which are not here: {reason}")


def _renewed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the first packages of any ranker, whose candidates had one item, as one of today's."""
    reads = {
        tower: {"events": of_tower["events"], "items": {CANDIDATE_ITEM: of_tower["items"]}}
        for tower, of_tower in manifest["reads"].items()
    }
    bags = {
        name: {"feature": CANDIDATE_ITEM, "is_of_request": False, "place": place}
        for name, place in manifest["shared"].items()
    }
    lengths = dict.fromkeys(reads, manifest["history_length"])
    return {**manifest, "reads": reads, "sequence_bags": bags, "history_lengths": lengths}


def tables_checksum(folder: Path) -> str | None:
    """What tells the tables of a package, or those that a delta makes, from others; None if it is not there any more.

    Args:
        folder: of the package or the delta.
    """
    if (delta := folder / DELTA_FILE).is_file():
        return checksum(delta)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    told: str = json.loads(path.read_text(encoding="utf-8"))["sha256"][TABLES_FILE]
    return told


def save_tables(tables: Mapping[str, Tensor], path: Path) -> None:
    """Write tables, each by itself: the same tables are the same bytes, whatever memory they share with others.

    Args:
        tables: by name.
        path: the file to make.
    """
    own = {
        name: table if table.untyped_storage().nbytes() == table.nbytes else table.clone()
        for name, table in tables.items()
    }
    torch.save(own, path)


def refuse_damaged(folder: Path, checksums: Mapping[str, str]) -> None:
    """Refuse a folder whose files are not what was written.

    Args:
        folder: of a package, or of a delta.
        checksums: of its files, by name.

    Raises:
        InputError: names the first file that is missing or another one.
    """
    for name, expected in checksums.items():
        refuse_damaged_file(folder / name, expected)


def refuse_damaged_file(path: Path, expected: str) -> None:
    """Refuse a file that is not what was written.

    Args:
        path: of the file.
        expected: its checksum.

    Raises:
        InputError: it is missing or another one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file: the package is not whole, export or copy it again")
    if (have := checksum(path)) != expected:
        raise InputError(
            f"{path}: checksum is {have[:12]}..., the manifest says {expected[:12]}...: the file is damaged, export or "
            "copy it again"
        )


def refuse_unlisted(folder: Path, names: Container[str]) -> None:
    """Refuse a package with files that nobody has signed: a vocabulary among them, for one, would be read.

    Args:
        folder: of a package, or of a delta.
        names: of the files that have been signed, and of the signatures.

    Raises:
        InputError: names the first other file.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in names:
            raise InputError(
                f"{path}: is not in {DELTA_FILE if (folder / DELTA_FILE).is_file() else MANIFEST_FILE}, so that nobody "
                "has signed it: do not serve the package; copy it again from where it was made"
            )


def checksum(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


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


def under(weights: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    """What a mapping has under names that begin with a prefix, by the rest of these."""
    return {
        name.removeprefix(f"{prefix}."): weight for name, weight in weights.items() if name.startswith(f"{prefix}.")
    }


class _PackagedPhases(Phases):
    """The compiled phases of a package, request by request."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], schema: RequestSchema) -> None:
        self._manifest = manifest
        # A package has scored requests of its schema: its towers read these numbers.
        self._numbers = {feature.name: feature.num_inputs for feature in schema.dense_sequence_features}
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        # Earlier manifests do not tell them: every state was in the dtype of its encoder.
        all_one = [[manifest["dtype"]] * len(shapes) for shapes in manifest["states"]]
        self._state_dtypes: list[list[str]] = manifest.get("state_dtypes", all_one)
        self._towers: dict[str, int] = {name: place for place, name in enumerate(manifest["reads"])}
        open_: Any = lambda name: torch._inductor.aoti_load_package(str(folder / name))  # noqa: E731
        self._histories = [open_(f"history_{place}.pt2") for place in self._towers.values()]
        self._request = open_("request.pt2") if manifest["has_head"] else None
        self._candidates = open_("candidates.pt2")

    def request(self, batch: RequestBatch, bags: Embeddings) -> RequestTerms:
        """Phase one of all but histories."""
        dense_BI, of_candidate = batch.request_dense, batch.candidate_dense.shape[1]
        need = self._manifest["num_request_dense"], self._manifest["num_candidate_dense"]
        if (dense_BI.shape[1], of_candidate) != need:
            raise InputError(
                f"batch: request_dense has {dense_BI.shape[1]} columns and candidate_dense {of_candidate}, but the "
                f"model reads {need[0]} and {need[1]}"
            )
        given = [dense_BI, *(bags[bag].tensor() for bag in self._manifest["request_bags"])]
        if self._request is None:
            return RequestTerms(tuple(given))
        of_each = [[tensor[row : row + 1] for tensor in given] for row in range(len(batch))]
        terms = [self._request(dense_1I, bags_1W) for dense_1I, *bags_1W in of_each]
        return RequestTerms(tuple(torch.cat(term) for term in zip(*terms, strict=True)))

    def encode(self, terms: RequestTerms, tower: str, events: Embeddings, lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories."""
        rows = self._rows(tower, "events", events)
        of_each = zip(*(rows_NW.split(lengths_B.tolist()) for rows_NW in rows), strict=True)
        states = [self._encode(self._towers[tower], of_request) for of_request in of_each]
        return states[0] if len(states) == 1 else HistoryState.cat(states)

    def _rows(self, tower: str, of: Literal["events", "items"], given: Embeddings) -> list[Tensor]:
        """What a tower reads of its events or candidates: compiled code checks no sizes."""
        rows = {feature: given[feature].tensor() for feature in self._manifest["reads"][tower][of]}
        for feature, rows_of_feature in rows.items():
            refuse_other_numbers(tower, feature, rows_of_feature, self._numbers)
        return list(rows.values())

    def _encode(self, place: int, events: Sequence[Tensor]) -> HistoryState:
        num_keys = self._manifest["num_keys"][place]
        if events[0].shape[0] > 0:
            return to_state(self._histories[place]([rows_nW.contiguous() for rows_nW in events]), num_keys)
        # Compiled attention does not take zero keys: a value that is zero adds exactly zero, too.
        shapes, dtypes = self._manifest["states"][place], self._state_dtypes[place]
        zeros = [torch.zeros(shape, dtype=getattr(torch, of)) for shape, of in zip(shapes, dtypes, strict=True)]
        return to_state(zeros, num_keys)

    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since: none can."""
        return False

    def _tensors(self, place: int, state: HistoryState) -> list[Tensor]:
        is_native = self._manifest["num_keys"][place] is None
        return list(to_tensors(NativeState.of(state, self._dtype) if is_native else state))

    def score(
        self,
        terms: RequestTerms,
        histories: Histories,
        batch: RequestBatch,
        bags: Embeddings,
        items: Mapping[str, Embeddings],
    ) -> Tensor:
        """Phase two; see `Phases.score`."""
        counts = batch.num_candidates.tolist()
        states = [[state[row] for state in histories[name] for row in range(len(state))] for name in self._towers]
        bags_CW = [bags[bag].tensor() for bag in self._manifest["candidate_bags"]]
        items_CW = [rows_CW for name in self._towers for rows_CW in self._rows(name, "items", items[name])]
        logits, stop = [], 0
        for row, count in enumerate(counts):
            start, stop = stop, stop + count
            if count == 0:
                continue
            of_request = [term[row : row + 1].contiguous() for term in terms.tensors]
            of_towers = [self._tensors(place, of_tower[row]) for place, of_tower in enumerate(states)]
            dense_mI, *rows = (
                rows_C[start:stop].contiguous() for rows_C in (batch.candidate_dense, *bags_CW, *items_CW)
            )
            given = rows[: len(bags_CW)], rows[len(bags_CW) :]
            logits.append(self._candidates(of_towers, of_request, dense_mI, *given))
        return torch.cat(logits)


def to_tensors(state: HistoryState) -> tuple[Tensor, ...]:
    """Keys of each layer, values of each, and the summary if there is one: contiguous, as compiled code expects.

    Of native code, keys and values of all layers.
    """
    if isinstance(state, NativeState):
        return state.tensors()
    tensors = (*state.keys, *state.values, *(() if state.summary is None else (state.summary,)))
    return tuple(tensor.contiguous() for tensor in tensors)


def to_state(tensors: Sequence[Tensor], num_keys: int | None) -> HistoryState:
    """The state of one request; it has `num_keys` keys, and as many values, but one if it has no keys.

    None is of native code.
    """
    if num_keys is None:
        return NativeState.of_tensors(tensors[0], tensors[1], row_count(tensors[0].shape[2]))
    num_values = max(num_keys, 1)
    values, summary = tensors[num_keys : num_keys + num_values], tensors[num_keys + num_values :]
    lengths = row_count(values[0].shape[0])
    return HistoryState(tuple(tensors[:num_keys]), tuple(values), lengths, summary[0] if summary else None)


def row_count(rows: int) -> Tensor:
    """int64 [1]: the number of rows, of which there is one at least."""
    # Inductor takes torch.full of a number that it does not know for a constant.
    return torch.arange(1, rows + 1)[-1:]
