"""One secret, a key for every role; files that hold it; and nothing that shows it."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import msgspec
import pytest
import zmq
from helpers.keys import SECRET, door, passes
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from torch_qgc.aggregator.process import AggregatorProcess, Serving
from torch_qgc.ddp.network import Network
from torch_qgc.errors import ConfigError
from torch_qgc.protocol.identity import Pass, Secret, check_unencrypted

secrets = st.binary(min_size=32, max_size=32).map(Secret)


def test_curve_is_there() -> None:
    assert zmq.has("curve")


BOTH = pytest.mark.parametrize("encrypt", [True, False])


@BOTH
@given(secrets, secrets)
@settings(max_examples=20)
def test_roles_and_secrets_share_no_key(encrypt: bool, first: Secret, second: Secret) -> None:
    def keys(secret: Secret) -> list[bytes]:
        pairs = [secret.pass_of(k, a, encrypt=encrypt).secret for k in range(3) for a in range(3)]
        doors = [secret.door_of(a, 3, encrypt=encrypt).secret for a in range(3)] if encrypt else []
        return pairs + doors

    assert len(set(keys(first))) == len(keys(first))
    assert keys(first) == keys(Secret(first.value))
    if first != second:
        assert set(keys(first)).isdisjoint(keys(second))


def credentials(shown: Pass) -> tuple[bytes, list[bytes]]:
    """What ZeroMQ hands on of a connection that was made with a pass."""
    if shown.aggregator:
        return b"CURVE", [z85.decode(zmq.curve_public(shown.secret))]
    return b"PLAIN", [b"worker", shown.secret]


@BOTH
def test_what_a_worker_shows_names_it_and_no_other(encrypt: bool) -> None:
    here = door(2, 5, encrypt=encrypt)
    for worker in range(5):
        assert here.worker_of(*credentials(SECRET.pass_of(worker, 2, encrypt=encrypt))) == worker
    nobody = [
        SECRET.pass_of(5, 2, encrypt=encrypt),
        SECRET.pass_of(1, 3, encrypt=encrypt),
        SECRET.pass_of(1, 2, encrypt=not encrypt),
        Secret.make().pass_of(1, 2, encrypt=encrypt),
    ]
    assert [here.worker_of(*credentials(each)) for each in nobody] == [None] * 4
    assert here.worker_of(b"NULL", []) is None


def test_what_a_worker_has_lets_it_show_no_other_key() -> None:
    """Neither its passes nor what an aggregator knows of workers holds the secret, or the key of another worker."""
    held = msgspec.msgpack.encode(passes(1, 3)) + msgspec.msgpack.encode(door(0, 3).workers)
    for hidden in (SECRET.value, *(SECRET.pass_of(k, a, encrypt=True).secret for k in (0, 2) for a in range(3))):
        assert hidden not in held


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost"])
def test_what_is_not_encrypted_stays_on_this_machine(host: str) -> None:
    check_unencrypted(host)
    Network(encrypt=False, host=host)
    for other in ("0.0.0.0", "192.0.2.7", "::", "example.org", ""):
        with pytest.raises(ConfigError, match="leave out encrypt=False"):
            check_unencrypted(other)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"):
        Network(encrypt=False, endpoints=(f"tcp://{host}:1", "tcp://192.0.2.7:1"))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        Serving(door=door(encrypt=False), bind="tcp://0.0.0.0:*").check()


# --- files ------------------------------------------------------------------------------------------------


def test_a_key_file_is_read_as_it_was_written_by_its_owner_alone(tmp_path: Path) -> None:
    secret, path = Secret.make(), tmp_path / "job.key"
    secret.save(path)
    assert Secret.load(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="name one that is not there"):
        Secret.make().save(path)
    assert Secret.load(path) == secret


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SECRET.save(tmp_path / "job.key")
    (tmp_path / "job.key").chmod(0o644)
    with caplog.at_level(logging.WARNING, "torch_qgc"):
        Secret.load(tmp_path / "job.key")
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("content", [b"", b"hunter2", b"torch_qgc-key-1:hunter2", b"torch_qgc-key-1:" + b"ab" * 31])
def test_a_file_that_holds_no_key_is_named_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="qgc keygen") as caught:
        Secret.load(path)
    assert str(path) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_missing_key_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.*cannot be read.*qgc keygen FILE.*--key-file"):
        Secret.load(tmp_path / "none")


# --- who could see it -------------------------------------------------------------------------------------


@BOTH
def test_nothing_prints_a_secret(encrypt: bool) -> None:
    here, shown = door(encrypt=encrypt), passes(1, encrypt=encrypt)
    text = repr(Serving(door=here)) + repr(shown) + f"{SECRET!r} {SECRET}"
    assert "Secret(...)" in text
    for hidden in filter(None, (SECRET.value, shown[0].secret, here.secret, *here.workers)):
        assert hidden.decode() not in text
        assert hidden.hex() not in text


@BOTH
def test_the_aggregators_process_shows_its_keys_to_nobody(encrypt: bool) -> None:
    """Its command line and its environment can be read while it runs."""
    here = door(encrypt=encrypt)
    process = AggregatorProcess(Serving(door=here))
    shown = b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    process.stop(0.0)
    assert process.poll() is not None
    for hidden in filter(None, (here.secret, *here.workers)):
        assert hidden not in shown
