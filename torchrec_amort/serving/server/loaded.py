"""Loaded: what processes that answer side by side have loaded, so that one that is started anew has it, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torchrec_amort.serving.rollout import Stage


@dataclass(frozen=True)
class RolledOut:
    """A package that answers a share of the users.

    Args:
        folder: of the package.
        version: its name.
        stage: whose requests it answers.
        switched_back: why it answers nobody any more; None if it does.
    """

    folder: str
    version: str
    stage: Stage
    switched_back: str | None = None


@dataclass(frozen=True)
class Loaded:
    """Packages that answer, and may answer again.

    Args:
        packages: folders of the one to go back to, if any, and of the one that answers.
        rollout: the package that is rolled out beside it, if any.

    Example::

        Loaded(("packages/monday",)).after("commit", "packages/tuesday").packages
    """

    packages: tuple[str, ...] = ()
    rollout: RolledOut | None = None

    @property
    def folders(self) -> list[str]:
        """Of all packages."""
        return [*self.packages, *(() if self.rollout is None else (self.rollout.folder,))]

    def after(self, order: str, *args: Any) -> Loaded:
        """What is loaded when all processes have done something: one of an `Endpoint`'s actions."""
        if order == "commit":
            return Loaded((*self.packages, *args)[-2:])
        if order == "roll_out":
            return replace(self, rollout=args[0])
        if order == "roll_back":
            return Loaded(self.packages if self.rollout is not None else self.packages[:-1])
        if order == "switch_back" and self.rollout is not None and args[0] == self.rollout.version:
            return replace(self, rollout=replace(self.rollout, switched_back=args[1]))
        return self
