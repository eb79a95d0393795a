"""Embedding tables of a model, whatever its collections."""

from __future__ import annotations

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection


def refuse_tied_tables(model: nn.Module) -> None:
    """Refuse a model in which a collection's table is also another's, or any other module's.

    Args:
        model: not sharded, or in part.

    Raises:
        ValueError: two of its modules share a table.

    Example::

        refuse_tied_tables(model)
    """
    collections = (EmbeddingBagCollection, EmbeddingCollection)
    tables = {
        weight.data_ptr() or id(weight)
        for module in model.modules()
        if isinstance(module, collections)
        for weight in module.parameters()
    }
    names: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        key = weight.data_ptr() or id(weight)  # Meta tensors have no address.
        if key not in tables:
            continue
        if key in names:
            raise ValueError(
                f"{names[key]} and {name} are one table, and sharding would make two different tables of it: give "
                "each a table of its own"
            )
        names[key] = name
