"""What may train a model whose tables TorchRec has sharded.

All that is private to TorchRec's sharded collections is in this file; it was tried with torchrec 1.8.0.
"""

from __future__ import annotations

import re

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection


def refuse_tables_without_optimizer(model: nn.Module, name: str = "model") -> None:
    """Refuse to train sharded tables that were given no optimizer: fbgemm would step them by SGD with a rate of 0.01.

    Optimizers of fused tables are given before sharding, by `apply_optimizer_in_backward` or the sharder's
    `fused_params`. Tables that the outer optimizer steps, as data-parallel ones, need none.

    Args:
        model: sharded or not.
        name: what the error message calls it.

    Raises:
        ValueError: it has such tables.

    Example::

        refuse_tables_without_optimizer(model)
    """
    for path, module in model.named_modules():
        if tables := _without_optimizer(module):
            code = re.sub(r"\.(\d+)", r"[\1]", f"{name}.{path}")
            raise ValueError(
                f"tables {tables} of {path} were sharded without an optimizer, and fbgemm would step them by SGD with "
                f"a rate of 0.01: before DistributedModelParallel, call apply_optimizer_in_backward(RowWiseAdagrad, "
                f'{code}.parameters(), {{"lr": ...}}), with the optimizer that the other tables have'
            )


def _without_optimizer(module: nn.Module) -> list[str]:
    """Names of the fused tables of a sharded collection that have no optimizer, the same on every rank."""
    if isinstance(module, ShardedEmbeddingCollection):
        shardings = list(module._sharding_type_to_sharding.values())
    elif isinstance(module, ShardedEmbeddingBagCollection):
        shardings = module._embedding_shardings
    else:
        return []
    groups = [group for s in shardings for of_rank in s._grouped_embedding_configs_per_rank for group in of_rank]
    tables = [
        t for group in groups if group.compute_kernel != EmbeddingComputeKernel.DENSE for t in group.embedding_tables
    ]
    return sorted({t.name for t in tables if not {"optimizer", "learning_rate"} & (t.fused_params or {}).keys()})
