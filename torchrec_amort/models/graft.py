"""graft: a trained model's weights into the same model built with histories, its scores unchanged.

Shape suffixes: C candidates, all requests together; S draws of vectors; R all other dimensions of a layer's input; X
columns of it that a grown layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.ranker import Call, ModelRanker, call_model, evaluating
from torchrec_amort.models.sharded import refuse_tables_without_optimizer

# A ReLU hides a column from one draw, not from several.
DRAWS = 4
# Columns of which less than this share varies do not depend on histories: it is rounding.
ROUNDING = 1e-4

# Tensors that each module was called with, by its path.
Inputs = Mapping[str, Sequence[Tensor]]


@torch.no_grad()
def graft(
    model: nn.Module, trained: nn.Module, batch: RequestBatch, *, call: Call | None = None, tolerance: float = 1e-5
) -> float:
    """Put a trained model's weights into the same model built with histories, so that it scores as before.

    Weights and buffers of the same name and shape are copied. A layer that has grown, since it reads the vectors of
    histories too, is found by running the model with other vectors in their place: its old columns are those that do
    not depend on them. Its new columns keep their initial values if the histories' vectors are zero at first
    (`starts_at_zero`), and are zero if not, so that in either case training moves them. Weights of one dimension, as of
    a batch norm, keep their initial values. A batch norm over histories undoes a small gate within a few steps, so that
    `starts_at_zero=False` is the smoother start there.

    `model` is changed only if scores agree. Tables that it shares with `trained` stay shared.

    Args:
        model: built on an `AmortizedEmbeddingBagCollection` where `trained` is built on an EmbeddingBagCollection, by
            the same class with the same arguments; not sharded.
        trained: the model without histories; not sharded.
        batch: B requests with C candidates, to compare scores by.
        call: how both models are called; see `ModelRanker`. `trained` gets a KeyedJaggedTensor of C rows.
        tolerance: how much a logit may differ.

    Returns:
        float: how much a logit differs at most, in eval mode.

    Raises:
        ValueError: a weight of `trained` is not in `model`, the columns of a grown layer cannot be told, or scores
            differ.

    Example::

        sparse = AmortizedEmbeddingBagCollection(trained.sparse_arch.embedding_bag_collection, [tower])
        model = DLRM(sparse, dense_in_features=2, dense_arch_layer_sizes=[32], over_arch_layer_sizes=[64, 1])
        difference = graft(model, trained, batch)
    """
    call = call or call_model
    ranker = ModelRanker(model, call)
    old, new = _weights(trained), _weights(model)
    names = _names(model, trained, new)
    weights = {name: old[was].to(new[name]) for was, name in names.items() if old[was].shape == new[name].shape}
    layers = [_Layer.of(name, old[was], new[name]) for was, name in names.items() if name not in weights]
    ids: Any = batch.sparse
    with evaluating(ranker), evaluating(trained):
        weights |= _fill_layers(ranker, batch, weights, layers)
        difference = float((_run(ranker, batch, weights) - call(trained, batch, ids)).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"logits differ by {difference:.2e}, more than {tolerance:.0e}, and nothing was changed: histories reach "
            "the logits past the layers that have grown, as by a softmax or a norm over all bags, or the models were "
            "built with different arguments. Let all towers start at zero, or add the history to the trained model's "
            "logits by ResidualHistory"
        )
    for name, weight in weights.items():
        if not new[name].is_set_to(weight):
            new[name].copy_(weight)
    return difference


def old_state_dict(model: nn.Module, trained: nn.Module) -> dict[str, Any]:
    """A model's state dict under the names of the one without histories, so that its checkpoints load into it.

    It shares the model's tensors, sharded or not, and lacks what is new and the layers that have grown, which `graft`
    fills before sharding.

    Args:
        model: built on an `AmortizedEmbeddingBagCollection`; a DistributedModelParallel or not sharded.
        trained: the model without histories, not sharded; only names and shapes are read, so it may be on meta.

    Raises:
        ValueError: a weight of `trained` is not in `model`, or a table has another shape there.

    Example::

        state = {"model": old_state_dict(model, trained)}
        torch.distributed.checkpoint.load(state, checkpoint_id="old")
    """
    old, new = trained.state_dict(), model.state_dict()
    tables = {
        f"{path}.{name}"
        for path, module in trained.named_modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
        for name in module.state_dict()
    }
    names = _names(model, trained, new)
    for was, name in names.items():
        if was in tables and old[was].shape != new[name].shape:
            raise ValueError(
                f"{was} is {list(old[was].shape)} and {name} {list(new[name].shape)}: give both tables one size"
            )
    return {was: new[name] for was, name in names.items() if old[was].shape == new[name].shape}


def old_optimizer_state_dict(model: DistributedModelParallel, trained: nn.Module) -> dict[str, Any]:
    """The states of a model's fused optimizers under the names of the one without histories; see `old_state_dict`.

    Tables that are data-parallel are not in it: the outer optimizer has their states.

    Args:
        model: built on an `AmortizedEmbeddingBagCollection`, and sharded with the optimizers that `trained` had.
        trained: the model without histories, not sharded; only names are read.

    Returns:
        dict: `{"state": ...}`, of `fused_optimizer.state_dict()`; rates are not in it.

    Raises:
        ValueError: a table of `trained` is not in `model`, or has no optimizer.

    Example::

        state = {"model": old_state_dict(dmp, trained), "optimizer": old_optimizer_state_dict(dmp, trained)}
        torch.distributed.checkpoint.load(state, checkpoint_id="old")
    """
    refuse_tables_without_optimizer(model)
    states = model.fused_optimizer.state_dict()["state"]
    names = _names(model, trained, model.state_dict())
    return {"state": {was: states[name] for was, name in names.items() if name in states}}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = model.state_dict()
    for name, weight in weights.items():
        if type(weight) is not Tensor:
            raise ValueError(
                f"{name} of the {type(model).__name__} is a {type(weight).__name__}, not a plain tensor: graft before "
                "sharding and quantizing"
            )
    return weights


def _names(model: nn.Module, trained: nn.Module, weights: Mapping[str, Any]) -> dict[str, str]:
    """Names of all weights of the trained model, and their names among the model's."""
    model = get_unwrapped_module(model)
    collection = ModelRanker(model).collection
    (path,) = (path for path, module in model.named_modules() if module is collection)
    prefix = path and f"{path}."
    renamed = {prefix + was: prefix + name for was, name in collection.renamed().items()}
    names = {name: renamed.get(name, name) for name in trained.state_dict()}
    for was, name in names.items():
        if name not in weights:
            raise ValueError(
                f"{was} of the trained model is not in the {type(model).__name__}: build both by one class, with the "
                "same arguments"
            )
    return names


def _run(ranker: ModelRanker, batch: RequestBatch, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits with some weights in the place of the model's own."""
    given = {f"model.{name}": weight for name, weight in weights.items()}
    # Tied weights are given by all their names.
    logits_CT: Tensor = functional_call(ranker, given, (batch,), tie_weights=False)
    return logits_CT


@dataclass(frozen=True)
class _Layer:
    """A weight that has grown.

    Args:
        name: in the model's state dict.
        old: as trained.
        new: of the model, with its initial values.
        dims: dimensions that have grown, from one size to one other.
    """

    name: str
    old: Tensor
    new: Tensor
    dims: Sequence[int]

    @classmethod
    def of(cls, name: str, old: Tensor, new: Tensor) -> _Layer:
        pairs = list(zip(old.shape, new.shape, strict=False))
        dims = [dim for dim, (before, after) in enumerate(pairs) if before != after]
        sizes = {pairs[dim] for dim in dims}
        if old.dim() != new.dim() or len(sizes) != 1 or any(before > after for before, after in sizes):
            raise ValueError(
                f"{name} is {list(old.shape)} in the trained model and {list(new.shape)} in the other: only inputs may "
                "grow, from one size to one other"
            )
        return cls(name, old, new, dims)

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns of the trained model and of this one."""
        return self.old.shape[self.dims[0]], self.new.shape[self.dims[0]]

    @property
    def paths(self) -> list[str]:
        """Paths of the module that has the weight, and of those that hold it, inside out."""
        owner = self.name.split(".")[:-1]
        return [".".join(owner[:length]) for length in range(len(owner), -1, -1)]

    def filled(self, is_old_X: Tensor, is_zero_X: Tensor) -> Tensor:
        """The weight, trained where it is old."""
        weight = self.new.clone()
        # One dimension is a bias or a norm's: its input is zero or what follows it has columns that are zero. Zeros in
        # both would never move.
        if weight.dim() > 1:
            is_zero = self._any(is_zero_X)
            # Of new inputs to new outputs nothing gets to old ones.
            weight.masked_fill_(is_zero & self._any(is_old_X) if len(self.dims) > 1 else is_zero, 0)
        places = [
            is_old_X.nonzero().flatten() if dim in self.dims else torch.arange(size, device=weight.device)
            for dim, size in enumerate(weight.shape)
        ]
        weight[torch.meshgrid(*places, indexing="ij")] = self.old.to(weight)
        return weight

    def _any(self, of_columns_X: Tensor) -> Tensor:
        """Of each entry of the weight, whether it holds for any of its columns."""
        holds = torch.zeros(self.new.shape, dtype=torch.bool, device=of_columns_X.device)
        for dim in self.dims:
            holds |= of_columns_X.view([-1 if other == dim else 1 for other in range(holds.dim())])
        return holds


def _fill_layers(
    ranker: ModelRanker, batch: RequestBatch, weights: Mapping[str, Tensor], layers: Sequence[_Layer]
) -> dict[str, Tensor]:
    """Grown layers, filled: those that read bags first, and then those that read what others made of them."""
    filled: dict[str, Tensor] = {}
    isolated = dict(weights)
    left = list(layers)
    while left:
        paths = {path for layer in left for path in layer.paths}
        drawn = [_inputs(ranker, batch, isolated, paths, seed, is_closed=False) for seed in range(DRAWS)]
        closed = [_inputs(ranker, batch, {**weights, **filled}, paths, seed, is_closed=True) for seed in range(DRAWS)]
        found = {layer.name: columns for layer in left if (columns := _columns(layer, drawn, closed)) is not None}
        if not found:
            raise ValueError(_what_was_found(left[0], drawn))
        for layer in left:
            if layer.name in found:
                is_old_X, is_zero_X = found[layer.name]
                filled[layer.name] = layer.filled(is_old_X, is_zero_X)
                # Histories go no further than to here, so that layers behind this one see them in new columns only.
                isolated[layer.name] = layer.filled(is_old_X, ~is_old_X)
        left = [layer for layer in left if layer.name not in found]
    return filled


def _inputs(
    ranker: ModelRanker,
    batch: RequestBatch,
    weights: Mapping[str, Tensor],
    paths: set[str],
    seed: int,
    is_closed: bool,
) -> Inputs:
    """What modules are called with if all bags are random, those of histories differently for each seed.

    Args:
        ranker: of the model.
        batch: gives the number of rows, and dense inputs.
        weights: of the model, where not its own.
        paths: of the modules.
        seed: of the histories' vectors.
        is_closed: whether those of towers that start at zero are zero.
    """
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # Cloned, as the model may go on in place.
        inputs[path] += [tensor.clone() for tensor in tensors if tensor.is_floating_point()]

    hooks = [ranker.collection.register_forward_hook(partial(_draw, seed=seed, is_closed=is_closed))]
    for path in paths:
        module = ranker.model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(partial(keep, path), with_kwargs=True))
    try:
        _run(ranker, batch, weights)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _draw(
    collection: AmortizedEmbeddingBagCollection, _: object, bags: KeyedTensor, seed: int, is_closed: bool
) -> KeyedTensor:
    keys, widths = bags.keys(), bags.length_per_key()
    stops = dict(zip(keys, accumulate(widths), strict=True))
    # The same for all seeds, but for the histories' vectors.
    values = torch.randn(bags.values().shape, generator=torch.Generator().manual_seed(DRAWS))
    generator = torch.Generator().manual_seed(seed)
    for tower in collection.towers:
        starts_at_zero = tower.gate is not None and not bool(tower.gate.any())
        for bag in tower.bags:
            vectors = values[:, stops[bag] - tower.width : stops[bag]]
            vectors.normal_(generator=generator)
            if is_closed and starts_at_zero:
                vectors.zero_()
    return KeyedTensor(keys, widths, values.to(bags.values()))


def _columns(layer: _Layer, drawn: Sequence[Inputs], closed: Sequence[Inputs]) -> tuple[Tensor, Tensor] | None:
    """Which columns are old, and which are to be zero since histories are not zero there; None if it cannot be told."""
    num_old, _ = layer.sizes
    for (is_old_X, _), (_, is_live_X) in zip(_readings(layer, drawn), _readings(layer, closed), strict=True):
        if int(is_old_X.sum()) == num_old:
            return is_old_X, is_live_X & ~is_old_X
    return None


def _readings(layer: _Layer, draws: Sequence[Inputs]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each input that may be the layer's, nearest first: columns that do not vary, and those that are not zero."""
    _, num_columns = layer.sizes
    for path in layer.paths:
        for inputs in zip(*(draw[path] for draw in draws), strict=True):
            drawn = torch.stack(inputs)
            # Rows are not columns, though there may be as many; last dimensions are columns more often than others.
            for dim in range(drawn.dim() - 1, 1, -1):
                if drawn.shape[dim] == num_columns:
                    values_SRX = drawn.movedim(dim, -1).reshape(len(inputs), -1, num_columns)
                    largest_X = values_SRX.abs().amax((0, 1))
                    varies_X = (values_SRX.amax(0) - values_SRX.amin(0)).amax(0) > ROUNDING * largest_X
                    yield ~varies_X, largest_X > 0


def _what_was_found(layer: _Layer, drawn: Sequence[Inputs]) -> str:
    num_old, num_columns = layer.sizes
    reading = next(_readings(layer, drawn), None)
    found = f"no module is called with {num_columns} columns of it"
    if reading is not None:
        found = f"{int(reading[0].sum())} of its columns do not depend on histories"
    return (
        f"{layer.name} has grown from {num_old} to {num_columns} columns, but {found}, so that the old ones cannot be "
        "told: add the history to the trained model's logits by ResidualHistory"
    )
