"""Embedding tables of a model, whatever its collections."""

from __future__ import annotations

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection


def tables_of(model: nn.Module) -> list[nn.Parameter]:
    """All tables of a model, of bags and of sequences: what an optimizer of tables steps.

    Once a model holds histories, `model.sparse_arch.parameters()` has the encoders' weights, too, and `RowWiseAdagrad`
    takes tables only.

    Args:
        model: not sharded.

    Example::

        apply_optimizer_in_backward(RowWiseAdagrad, tables_of(model), {"lr": 0.05})
    """
    collections = (EmbeddingBagCollection, EmbeddingCollection)
    return [weight for module in model.modules() if isinstance(module, collections) for weight in module.parameters()]


def refuse_tied_tables(model: nn.Module) -> None:
    """Refuse a model in which a collection's table is also another's, or any other module's.

    Args:
        model: not sharded, or in part.

    Raises:
        ValueError: two of its modules share a table.

    Example::

        refuse_tied_tables(model)
    """
    tables = {weight.data_ptr() or id(weight) for weight in tables_of(model)}
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
