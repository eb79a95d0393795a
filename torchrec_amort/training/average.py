"""What happens to all weights every few steps: their moving average, and the decay of tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

# An update reads and writes whole tables, a step a few of their rows.
UPDATE_EVERY = 5


class TableDecay:
    """Decoupled weight decay of embedding tables (Loshchilov and Hutter, arXiv 1711.05101, section 2).

    All rows shrink a little, those that no step reads as well. fbgemm's fused optimizers decay on CUDA alone, and only
    the rows that a step reads.

    Args:
        module: holds the tables, sharded or not.
        names: keys of the tables in its state dict.
        decay: the share by which a row shrinks in a step.

    Raises:
        ValueError: `decay` is not between 0 and 1.

    Example::

        decay = TableDecay(module, ["embeddings.item.weight"], decay=1e-4)
        for step in range(1, 1001):
            train_step()
            decay.update(step)
    """

    def __init__(self, module: nn.Module, names: Collection[str], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"table_weight_decay is {decay}, not from 0 to 1")
        self.decay = decay
        self._tables = local_tensors({name: w for name, w in module.state_dict().items() if name in names})

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Shrink the tables after a step, the first one being 1."""
        if self.decay and step % UPDATE_EVERY == 0:
            for table in self._tables:
                table.mul_((1 - self.decay) ** UPDATE_EVERY)


class WeightAverage:
    """An exponential moving average of all weights, sharded as they are (Polyak averaging).

    What is no floating-point number, such as the ids of a managed table, is as it was when it last moved.

    It moves every few steps, and faster than `decay` in the first ones, so that it soon forgets the initial weights.

    Args:
        module: whose weights, sharded or not.
        decay: what is left of the average after a step.

    Raises:
        ValueError: `decay` is not between 0 and 1.

    Example::

        average = WeightAverage(module, decay=0.999)
        for step in range(1, 1001):
            train_step()
            average.update(step)
        average.weights["over_arch.model.0.bias"]
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"average_decay is {decay}, not between 0 and 1")
        self.decay = decay
        self._current = local_tensors(module.state_dict())
        self.weights: dict[str, Any] = {name: weight.clone() for name, weight in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, the first one being 1."""
        if step % UPDATE_EVERY:
            return
        updates = step // UPDATE_EVERY
        decay = min(self.decay**UPDATE_EVERY, updates / (updates + 10))
        for average, current in zip(local_tensors(self.weights), self._current, strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights of now, as they were loaded."""
        for average, current in zip(local_tensors(self.weights), self._current, strict=True):
            average.copy_(current)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the averaged weights within the context, and its own ones again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, current in zip(local_tensors(self.weights), self._current, strict=True):
            own = current.clone()
            current.copy_(average)
            average.copy_(own)


def local_tensors(weights: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that this rank has of the weights."""
    tensors: list[Tensor] = []
    for weight in weights.values():
        if isinstance(weight, ShardedTensor):
            tensors += [shard.tensor for shard in weight.local_shards()]
        else:
            tensors.append(weight)
    return tensors
