"""Whether a module computes what its class says.

Hooks, patched methods, subclasses and parametrizations change what a module computes, and not its weights. Whoever
computes a module's function from its weights (native code, a head in two phases, an over arch with new columns) has to
ask here first; if the answer is no, the module itself has to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

FORWARD_HOOKS: Mapping[str, str] = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
ALL_HOOKS: Mapping[str, str] = {
    **FORWARD_HOOKS,
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
# What a Perceptron calls this is called by all who restate it, and may be anything.
_CALLED = "_activation_fn"
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONSTANTS = (bool, int, float, str, tuple, type(None))


class Plain:
    """Tells why modules of some classes may compute something else than their class says.

    Args:
        classes: their methods have to stay those of the moment that this is made.
        hooks: those that matter, attribute and name.

    Example::

        reason = Plain(nn.Linear).why_not(model.over_arch.model[1], "over_arch.model.1")
    """

    def __init__(self, *classes: type[nn.Module], hooks: Mapping[str, str] = FORWARD_HOOKS) -> None:
        self._methods = {kind: _methods(kind) for kind in classes}
        self._hooks = hooks

    def why_not(self, module: nn.Module, path: str) -> str | None:
        """Why a module may compute something else, its submodules aside; or None.

        Args:
            module: of the model.
            path: its name there.
        """
        kind = type(module)
        if kind not in self._methods:
            return f"{path} is a {kind.__name__} of {kind.__module__}"
        return self.why_replaced(kind) or why_patched(module, path, self._hooks)

    def why_replaced(self, kind: type[nn.Module]) -> str | None:
        """Why all modules of one of the classes may compute something else, or None: a method was replaced."""
        for name, method in self._methods[kind].items():
            if inspect.getattr_static(kind, name, None) is not method:
                return f"{kind.__name__}.{name} was replaced"
        return None

    def why_not_any(self, module: nn.Module, path: str) -> str | None:
        """Why a module or one of its submodules may compute something else; or None."""
        reasons = (self.why_not(part, _join(path, name)) for name, part in _parts(module).items())
        return next(filter(None, reasons), None)


def why_patched(module: nn.Module, path: str, hooks: Mapping[str, str] = FORWARD_HOOKS) -> str | None:
    """Why a module may compute something else than others of its class, its submodules aside; or None.

    Args:
        module: of the model.
        path: its name there.
        hooks: those that matter, attribute and name.
    """
    for attribute, hook in hooks.items():
        if getattr(module, attribute):
            return f"{path} has {hook}"
        if vars(torch.nn.modules.module).get(f"_global{attribute}"):
            return f"all modules have {hook}"
    return why_own_method(module, path)


def why_other_methods(kind: type[nn.Module], base: type[nn.Module]) -> str | None:
    """Why a class may compute something else than its base class, or None: it overrides a method but `__init__`.

    Args:
        kind: the class.
        base: one of its bases.
    """
    for derived in kind.__mro__[: kind.__mro__.index(base)]:
        for name in vars(derived):
            if name != "__init__" and callable(getattr(base, name, None)):
                return f"{derived.__name__} overrides {base.__name__}.{name}"
    return None


def why_own_method(module: nn.Module, path: str) -> str | None:
    """Why a module may compute something else than its class, its submodules aside: a method is set on it; or None.

    Args:
        module: of the model.
        path: its name there.
    """
    for name in vars(module):
        if callable(getattr(type(module), name, None)):
            return f"{path} has a {name} of its own, set on the module"
    return None


def why_unlike(module: nn.Module, like: nn.Module, path: str) -> str | None:
    """Why a module may compute something else than another one would with its weights, or None.

    Args:
        module: of a model, plain with all its submodules.
        like: as its constructor makes it, for these sizes; its weights do not matter.
        path: the module's name in the model.
    """
    have, expected = _parts(module), _parts(like)
    for name in have.keys() | expected.keys():
        part, model_part = have.get(name), expected.get(name)
        if type(part) is not type(model_part):
            return f"{_join(path, name)} is {_kind(part)}, not {_kind(model_part)}"
        assert part is not None
        assert model_part is not None
        for key, value in _constants(model_part).items():
            if (other := _constants(part).get(key)) != value:
                return f"{_join(path, name)} has {key} {other}, not {value}"
        for key, buffer in model_part.named_buffers(recurse=False):
            if not torch.equal(part.get_buffer(key).cpu(), buffer.cpu()):
                return f"{_join(path, name)} has another {key}"
    return None


def _constants(module: nn.Module) -> dict[str, Any]:
    """Numbers and words among a module's attributes, and the shapes of its parameters."""
    constants = {key: value for key, value in vars(module).items() if isinstance(value, _CONSTANTS)}
    shapes = {key: None if weight is None else tuple(weight.shape) for key, weight in module._parameters.items()}
    return {key: value for key, value in (constants | shapes).items() if key not in _OF_ALL_MODULES}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """A module and its submodules by name, but those that are called."""
    return {name: part for name, part in module.named_modules() if _CALLED not in name.split(".")}


def _methods(kind: type[nn.Module]) -> dict[str, Any]:
    """The methods of a class, but nn.Module's, and what a call of it does."""
    classes = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    names = {name for base in classes for name, method in vars(base).items() if inspect.isfunction(method)}
    return {name: inspect.getattr_static(kind, name) for name in sorted(names | {"__call__"})}


def _kind(module: nn.Module | None) -> str:
    return "not there" if module is None else f"a {type(module).__name__}"


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))
