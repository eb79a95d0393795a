"""Tables of a package in files that processes map: in memory once, however many processes read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from torchrec_amort.errors import InputError
from torchrec_amort.files import new_file

Tables: TypeAlias = QuantEmbeddingBagCollection | QuantEmbeddingCollection


@dataclass(frozen=True)
class MappedTables:
    """Files of the tables of one version.

    The first process that fills its tables writes them, whole or not at all; later ones read no weights of their own.

    Args:
        folder: of the files, best one in memory, such as on /dev/shm.

    Example::

        MappedTables(Path("/dev/shm/films/1f3a")).fill(collection, "candidate", lambda: weights)
    """

    folder: Path

    def fill(self, tables: Tables, name: str, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let a collection read the files.

        Args:
            tables: that are not filled yet.
            name: tells them from others of the version.
            weights: gives their state dict, if it has to be written.

        Raises:
            InputError: there is no room for the files.
        """
        files = [self.folder / f"{name}_{place}" for place in range(len(tables._emb_modules))]
        if not all(file.is_file() for file in files):
            tables.load_state_dict(weights())
            for module, file in zip(tables._emb_modules, files, strict=True):
                _write(module.weights_host, file)
        for module, file in zip(tables._emb_modules, files, strict=True):
            # Private: what one process would write, others do not read.
            size = module.weights_host.numel()
            module.weights_host = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        _show(tables)


def _write(weights: Tensor, file: Path) -> None:
    try:
        with new_file(file) as temporary:
            # Not by `tofile`, which tells of no write that fails late.
            temporary.write_bytes(weights.numpy().data)
    except OSError as error:
        raise InputError(
            f"{file}: {weights.nbytes:,} bytes of tables cannot be written ({error}): give {file.parent} more room; "
            "where it is memory, as /dev/shm is, it takes the size of the tables of all versions"
        ) from error


def _show(tables: Tables) -> None:
    """Let the collection's state dict have the weights that its kernels read, and no other ones stay in memory."""
    shown = tables.embedding_bags if isinstance(tables, QuantEmbeddingBagCollection) else tables.embeddings
    for module, configs in zip(tables._emb_modules, tables._key_to_tables.values(), strict=True):
        rows = module.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        for config, (weight, _, _) in zip(configs, rows, strict=True):
            shown[config.name].weight = weight
