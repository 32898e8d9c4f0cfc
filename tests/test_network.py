"""How ranks find and know each other: who gets which keys, whose key files fit, and where aggregators listen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from helpers.loops import mlp
from helpers.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.ddp import network
from torch_qgc.ddp.numbers import Numbers
from torch_qgc.protocol.identity import Secret

LIMITS = qgc.Limits(chunk_numel=512)


def refusal_of(call: Callable[[], object]) -> str:
    with pytest.raises(qgc.ConfigError) as caught:
        call()
    return str(caught.value)


def train(rank: int, network: qgc.Network, first_step: int = 0) -> tuple[str, int, list[str]]:
    """Make three steps with two aggregators; return the parameters' digest, the step, and the endpoints."""
    ddp = DistributedDataParallel(mlp(20))
    state = qgc.QGCState(ddp, aggregators=2, deadline_s=None, limits=LIMITS, network=network)
    ddp.register_comm_hook(state, qgc.qgc_hook)
    state.load_state_dict({**state.state_dict(), "step": first_step})
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    batches = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(rank))
    for batch in batches:
        ddp(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    endpoints = state.replica.joined()[0].session.endpoints
    state.close()
    return state.replica.layout.parameter_digest(), state.step, endpoints


def plain_job(rank: int) -> tuple[str, int, list[str]]:
    return train(rank, qgc.Network(encrypt=False), first_step=7)


def test_a_job_is_what_it_was_at_the_first_step_and_need_not_be_encrypted() -> None:
    """From a checkpoint, which changes the job after its aggregators were started."""
    (digest, step, endpoints), other = run_ranks(plain_job, ranks=2)
    assert (digest, step, endpoints) == other
    assert step == 7 + 3
    assert [endpoint.rsplit(":", 1)[0] for endpoint in endpoints] == ["tcp://127.0.0.1"] * 2


# --- keys -------------------------------------------------------------------------------------------------


def own_keys(rank: int) -> bytes:
    return msgspec.msgpack.encode(
        network._hand_out_keys(dist.group.WORLD, Numbers(rank, 3, given=False), qgc.Network(), 2)
    )


def test_a_rank_gets_its_own_keys_and_no_others() -> None:
    given = [msgspec.msgpack.decode(each) for each in run_ranks(own_keys, ranks=3)]
    secrets = [{shown["secret"] for shown in passes} for passes, _ in given]
    assert [len(own) for own in secrets] == [2, 2, 2]  # one for each aggregator
    assert len(set.union(*secrets)) == 6
    assert [list(doors) for _, doors in given] == [[0], [1], []]  # of the aggregators that they start


def keyed_job(rank: int, files: list[str | None]) -> str | tuple[str, int, list[str]]:
    net = qgc.Network(key_file=files[rank])
    return train(rank, net) if len(set(files)) == 1 else refusal_of(lambda: train(rank, net))


def test_a_key_file_that_all_ranks_have_is_the_jobs_key(tmp_path: Path) -> None:
    Secret.make().save(tmp_path / "a.key")
    first, second = run_ranks(keyed_job, [str(tmp_path / "a.key")] * 2, ranks=2)
    assert first == second


@pytest.mark.parametrize("other", [None, "b.key"])
def test_ranks_with_different_keys_are_told_on_every_rank(tmp_path: Path, other: str | None) -> None:
    for name in ("a.key", "b.key"):
        Secret.make().save(tmp_path / name)
    files = [str(tmp_path / "a.key"), other and str(tmp_path / other)]
    for text in run_ranks(keyed_job, files, ranks=2):
        assert "the same key on every rank" in text
        assert ("got none" in text or "and none on rank 1" in text) == (other is None)


def without_a_key(rank: int) -> list[str]:
    os.environ.pop(network.KEY_FILE_VARIABLE)
    ends = ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    return [
        refusal_of(lambda: train(rank, qgc.Network(endpoints=ends))),
        refusal_of(lambda: train(rank, qgc.Network(endpoints=ends, key_file="/no/file"))),
        refusal_of(lambda: train(rank, qgc.Network(endpoints=ends[:1]))),
    ]


def test_aggregators_that_run_already_need_a_key_and_be_as_many() -> None:
    for missing, unreadable, few in run_ranks(without_a_key, ranks=2):
        assert "qgc keygen FILE" in missing
        assert "/no/file cannot be read" in unreadable
        assert "aggregators=1" in few


# --- addresses --------------------------------------------------------------------------------------------


def on_two_machines(rank: int, master: str, host: str | None, encrypt: bool) -> tuple[str, int, list[str]]:
    socket.gethostname = lambda: f"machine-{rank}"  # type: ignore[assignment]
    os.environ["MASTER_ADDR"] = master
    return train(rank, qgc.Network(host=host, encrypt=encrypt))


def test_on_several_machines_an_aggregator_listens_where_the_others_reach_it() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 1))  # a documentation address: nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address = probe.getsockname()[0]
    first, second = run_ranks(on_two_machines, "198.51.100.1", None, True, ranks=2)
    assert first == second
    assert [endpoint.rsplit(":", 1)[0] for endpoint in first[2]] == [f"tcp://{address}"] * 2


@pytest.mark.parametrize(
    ("master", "host", "encrypt", "remedy"),
    [
        ("127.0.0.1", None, True, r"Network\(host=<an address of it that the others reach>\)"),
        ("198.51.100.1", "127.0.0.1", True, r"Network\(host=<an address of it that the others reach>\)"),
        ("198.51.100.1", None, False, "leave out encrypt=False"),
    ],
    ids=["no address is known", "loopback", "not encrypted"],
)
def test_what_other_machines_cannot_reach_or_could_read_is_refused(
    master: str, host: str | None, encrypt: bool, remedy: str
) -> None:
    outcomes = run_ranks(on_two_machines, master, host, encrypt, ranks=2, check=False)
    for outcome in outcomes:
        assert "ConfigError" in outcome.error
        with pytest.raises(qgc.ConfigError, match=remedy):
            raise qgc.ConfigError(outcome.error)


def through_a_tunnel(rank: int) -> list[str]:
    return train(rank, qgc.Network(through=lambda endpoint: endpoint.replace("127.0.0.1", "localhost")))[2]


def test_endpoints_may_be_reached_at_other_addresses() -> None:
    for endpoints in run_ranks(through_a_tunnel, ranks=1):
        assert all(endpoint.startswith("tcp://localhost:") for endpoint in endpoints)
