"""Who may call a server: tokens of roles, and TLS."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc

from torchrec_amort.errors import InputError

# `score` reads scores; `admin` changes versions and forgets users.
Role = Literal["score", "admin"]
_PREFIX = "Bearer "


class Unauthenticated(Exception):
    """The caller did not show the token of the role."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call, and how the connection is kept private.

    Args:
        tokens: that callers have to show, by role; a role without one is anybody's.
        certificate: PEM file of the server's chain; without, connections are plain.
        private_key: PEM file of its key.
        client_ca: PEM file of the authority whose certificates callers have to show; any caller unless given.

    Raises:
        InputError: a file is missing, or one of certificate and key is not given.

    Example::

        access = Access(tokens={"admin": "..."}, certificate="server.pem", private_key="server.key")
    """

    tokens: dict[Role, str] = field(default_factory=dict, repr=False)
    certificate: str | None = None
    private_key: str | None = None
    client_ca: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("certificate and private_key go together: give both, or none")
        if self.client_ca is not None and self.certificate is None:
            raise InputError("client_ca is of TLS: give certificate and private_key, too")
        for name in ("certificate", "private_key", "client_ca"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise InputError(f"{name}: {path}: no such file")

    def refuse_other(self, authorization: str | None, role: Role) -> None:
        """Refuse who does not show the token of a role.

        Args:
            authorization: what the caller shows, `Bearer TOKEN`.
            role: that the call needs.

        Raises:
            Unauthenticated: it is not that token.
        """
        token = self.tokens.get(role)
        shown = (authorization or "").encode()
        # In constant time, so that a wrong one does not tell how far it was right.
        if token is not None and not hmac.compare_digest(shown, (_PREFIX + token).encode()):
            raise Unauthenticated(f"the call needs the token of {role}: send it as authorization: {_PREFIX}TOKEN")

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Of a gRPC server; None for plain connections."""
        if self.certificate is None or self.private_key is None:
            return None
        pair = Path(self.private_key).read_bytes(), Path(self.certificate).read_bytes()
        authority = None if self.client_ca is None else Path(self.client_ca).read_bytes()
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
