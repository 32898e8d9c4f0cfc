"""Who speaks: the secret of a job, and what each worker and aggregator gets of it. No other file makes keys."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import stat
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from torch_qgc.errors import ConfigError
from torch_qgc.logs import logger

__all__ = [
    "KEY_FILE_VARIABLE",
    "SECRET_BYTES",
    "SHARE_A_KEY",
    "Door",
    "Pass",
    "Secret",
    "check_unencrypted",
    "is_loopback",
]

SECRET_BYTES = 32
KEY_FILE_VARIABLE = "QGC_KEY_FILE"  # where aggregators that run on their own, and their jobs, find the secret
SHARE_A_KEY = (
    "make a key with `qgc keygen FILE`, start aggregators with `qgc aggregator --key-file FILE`, and pass "
    f"Network(key_file=FILE), or set {KEY_FILE_VARIABLE}=FILE for both"
)
_PREFIX = "torch_qgc-key-1:"  # of the one line of a key file; what follows is hexadecimal
_PERSON = b"torch_qgc keys 1"


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker shows to one aggregator, and expects of it.

    Args:
        worker: its number.
        secret: its secret key of CURVE, or its password where nothing is encrypted.
        aggregator: the aggregator's public key; empty where nothing is encrypted.
    """

    worker: int
    secret: bytes
    aggregator: bytes

    def put_on(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket show it, before it connects."""
        if self.aggregator:
            socket.curve_publickey = zmq.curve_public(self.secret)
            socket.curve_secretkey = self.secret
            socket.curve_serverkey = self.aggregator
        else:
            socket.plain_username = b"worker"
            socket.plain_password = self.secret

    def __repr__(self) -> str:
        return f"Pass(worker={self.worker}, ...)"


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """What one aggregator shows to workers, and by what it knows them.

    Args:
        secret: its secret key of CURVE; empty where nothing is encrypted.
        workers: public key, or password where nothing is encrypted -> number of the worker.
    """

    secret: bytes
    workers: dict[bytes, int]

    @property
    def encrypts(self) -> bool:
        """What passes is encrypted."""
        return bool(self.secret)

    def put_on(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket show it, before it is bound."""
        if self.encrypts:
            socket.curve_server = True
            socket.curve_secretkey = self.secret
        else:
            socket.plain_server = True

    def worker_of(self, mechanism: bytes, credentials: list[bytes]) -> int | None:
        """Return whose credentials these are [ZeroMQ RFC 27]; None: nobody's."""
        match mechanism, credentials:
            case b"CURVE", [public] if self.encrypts:
                return self.workers.get(z85.encode(public))
            case b"PLAIN", [_, password] if not self.encrypts:
                return self.workers.get(password)
        return None

    def __repr__(self) -> str:
        return f"Door({len(self.workers)} workers, {'encrypts' if self.encrypts else 'does not encrypt'}, ...)"


class Secret(msgspec.Struct, frozen=True):
    """That from which all keys of a job follow: who has it can make them, who has one of them can make no other.

    A key is BLAKE2b(key=secret, person="torch_qgc keys 1", role and numbers) [RFC 7693].
    """

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) != SECRET_BYTES:
            raise ConfigError(
                f"key: expected {SECRET_BYTES} bytes, got {len(self.value)}: make one with `qgc keygen FILE`"
            )

    @classmethod
    def make(cls) -> Secret:
        """Make a new secret."""
        return cls(os.urandom(SECRET_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Secret:
        """Read a key file.

        Raises:
            ConfigError: there is none, or it is something else.
        """
        try:
            text, mode = Path(path).read_bytes()[:4096].decode("ascii", "replace").strip(), os.stat(path).st_mode
        except OSError as error:
            raise ConfigError(f"key_file: {path} cannot be read ({error.strerror}): {SHARE_A_KEY}") from error
        try:
            if not text.startswith(_PREFIX):
                raise ValueError
            secret = cls(bytes.fromhex(text.removeprefix(_PREFIX)))
        except ValueError:  # also the ConfigError of a wrong length; what the file holds is not to be shown
            raise ConfigError(
                f"key_file: expected a file that `qgc keygen` has made, one line {_PREFIX}<64 hexadecimal digits>, got "
                f"something else in {path}"
            ) from None
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            logger.warning("the job's key in %s can be read by other users of this machine: chmod 600", path)
        return secret

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a key file that its owner alone can read.

        Raises:
            ConfigError: there is a file already, or none can be made there.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(
                f"key file: {path} cannot be made ({error.strerror}): name one that is not there"
            ) from error
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{_PREFIX}{self.value.hex()}\n")

    @property
    def fingerprint(self) -> str:
        """What tells this secret from others, and nothing about it."""
        return self._derive("fingerprint").hex()[:16]

    def pass_of(self, worker: int, aggregator: int, *, encrypt: bool) -> Pass:
        """Return what a worker shows to an aggregator."""
        server = zmq.curve_public(self._curve("aggregator", aggregator)) if encrypt else b""
        return Pass(worker=worker, secret=self._worker(worker, aggregator, encrypt), aggregator=server)

    def door_of(self, aggregator: int, workers: int, *, encrypt: bool) -> Door:
        """Return what an aggregator shows to that many workers."""
        shown = {self._worker(k, aggregator, encrypt): k for k in range(workers)}
        if not encrypt:
            return Door(secret=b"", workers=shown)
        public = {zmq.curve_public(secret): k for secret, k in shown.items()}
        return Door(secret=self._curve("aggregator", aggregator), workers=public)

    def _worker(self, worker: int, aggregator: int, encrypt: bool) -> bytes:
        if encrypt:
            return self._curve("worker", worker, aggregator)
        return self._derive("password", worker, aggregator).hex().encode()

    def _curve(self, role: str, *numbers: int) -> bytes:
        """Return a secret key of CURVE (Curve25519), in the printable form that ZeroMQ takes."""
        return z85.encode(self._derive(role, *numbers))

    def _derive(self, role: str, *numbers: int) -> bytes:
        text = " ".join([role, *map(str, numbers)]).encode()
        return hashlib.blake2b(text, digest_size=32, key=self.value, person=_PERSON).digest()

    def __repr__(self) -> str:
        return "Secret(...)"


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_unencrypted(host: str) -> None:
    """Refuse to send what is not encrypted over a network.

    Raises:
        ConfigError: the address is not one of this machine alone.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"encrypt: expected an address of this machine alone (127.0.0.1) where nothing is encrypted, got {host}: "
            "leave out encrypt=False (--no-encrypt)"
        )
