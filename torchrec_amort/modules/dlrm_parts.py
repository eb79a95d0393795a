"""The parts of TorchRec's DLRMs, of which some names are private: all of those are here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchrec.models.dlrm import OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import Perceptron

# First linear layers in a DLRM: of the over arch, and of both branches of a projection interaction.
FIRST_OF_OVER = "over_arch.model.0._mlp.0._linear"
FIRST_OF_BRANCHES = [f"inter_arch.interaction_branch{branch}.model._mlp.0._linear" for branch in (1, 2)]


def perceptrons(arch: nn.Module) -> list[Any]:
    """The layers of a dense or over arch that have an activation."""
    return [module for module in arch.modules() if isinstance(module, Perceptron)]


def activations(arch: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """What each of these layers applies."""
    return [layer._activation_fn for layer in perceptrons(arch)]


def linears(arch: nn.Module) -> list[Any]:
    """The linear layers of a dense or over arch."""
    model: Any = arch.model
    last = [model[-1]] if isinstance(arch, OverArch) else []
    return [*(layer._linear for layer in perceptrons(arch)), *last]


def sizes(arch: nn.Module) -> tuple[int, list[int]]:
    """Inputs of a dense or over arch, and outputs of each of its layers."""
    layers = linears(arch)
    return layers[0].in_features, [layer.weight.shape[0] for layer in layers]


def set_first_linear(arch: nn.Module, linear: nn.Module) -> None:
    """Put another linear layer in place of an arch's first one."""
    perceptrons(arch)[0]._linear = linear


def crossnet_like(crossnet: LowRankCrossNet, num_features: int) -> LowRankCrossNet:
    """A cross net of as many layers and of the rank, for so many features."""
    return LowRankCrossNet(num_features, crossnet._num_layers, crossnet._low_rank)
