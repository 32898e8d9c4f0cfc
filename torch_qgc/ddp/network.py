"""How a job's workers and aggregators find and know each other: addresses, keys, and the processes that are started."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import urlsplit

import torch.distributed as dist

from torch_qgc.aggregator.process import AggregatorProcess, Serving
from torch_qgc.ddp.numbers import Numbers
from torch_qgc.ddp.rendezvous import agree, gather, scatter
from torch_qgc.errors import ConfigError, JobFailed, QGCError
from torch_qgc.planner import Plan
from torch_qgc.protocol import environment
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.identity import (
    KEY_FILE_VARIABLE,
    SHARE_A_KEY,
    Door,
    Pass,
    Secret,
    check_unencrypted,
    is_loopback,
)
from torch_qgc.protocol.server import Bounds

__all__ = ["Aggregators", "Network", "start_aggregators"]

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Network:
    """How workers reach the aggregators.

    Args:
        host: address on which aggregators that are started as children of this job listen. None: 127.0.0.1 if all ranks
            are on one machine, else the address that a rank's machine has on its way to MASTER_ADDR.
        encrypt: all that is sent. False is for jobs on one machine alone: connections still need the job's keys, and
            the processor time of encryption is saved (docs/security.md says how much that is).
        endpoints: addresses of aggregators that run already (`qgc aggregator --bind`); none is started then. Empty:
            those in the environment variable QGC_ENDPOINTS, with commas between them, if it is set.
        key_file: the job's key, which `qgc keygen` has made, on every rank's machine. None: rank 0 makes a key and
            hands it out over the process group; for `endpoints`, the file that the environment variable QGC_KEY_FILE
            names.
        through: (endpoint) -> the address at which this rank reaches it, where that is another one: a tunnel, a proxy.
        trace: a file for the events of the aggregators that are started, one JSON line each; "{}" in its name becomes
            the aggregator's number.
    Raises:
        ConfigError: an address that others can reach, without encryption.
    """

    host: str | None = None
    encrypt: bool = True
    endpoints: tuple[str, ...] = ()
    key_file: str | None = None
    through: Callable[[str], str] | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        if not self.encrypt:
            for host in (self.host or _LOOPBACK, *(urlsplit(endpoint).hostname or "" for endpoint in self.endpoints)):
                check_unencrypted(host)

    def completed(self) -> Network:
        """Return this, with the addresses that the environment names where none were given."""
        named = environment.endpoints()
        return replace(self, endpoints=named) if named and not self.endpoints else self


@dataclass(frozen=True)
class Aggregators:
    """How this rank reaches the job's aggregators.

    Attributes:
        endpoints: of all of them, in order.
        passes: what this worker shows to each.
        children: those that this rank has started.
    """

    endpoints: Sequence[str]
    passes: Sequence[Pass]
    children: list[AggregatorProcess]


class _Keys(NamedTuple):
    """What one rank gets of a job's secret: a worker's passes, and the doors of the aggregators that it starts."""

    passes: list[Pass]
    doors: dict[int, Door]


def start_aggregators(
    process_group: dist.ProcessGroup, numbers: Numbers, network: Network, spec: JobSpec, plan: Plan
) -> Aggregators:
    """Start aggregator i as a child of rank i mod K, and tell every rank where they are, and by what it is known there.

    Where `network` names some that run already, or workers' numbers are given, nothing is started.

    Raises:
        ConfigError: on every rank if it happens on one.
    """
    keys = _hand_out_keys(process_group, numbers, network, spec.aggregators)
    if network.endpoints:
        return Aggregators(_ways(network, network.endpoints), keys.passes, [])
    children: list[AggregatorProcess] = []
    machines = sorted(set(gather(process_group, socket.gethostname())))
    try:
        with agree(process_group):
            for index, door in keys.doors.items():
                serving = Serving(
                    door=door,
                    bind=f"tcp://{_host(network, machines)}:*",
                    index=index,
                    count=spec.aggregators,
                    bounds=Bounds.of(spec, plan),
                    trace=None if network.trace is None else network.trace.format(index),
                )
                try:
                    children.append(AggregatorProcess(serving))
                except OSError as error:
                    raise JobFailed(f"the aggregator's process cannot be started: {error}") from error
    except QGCError:
        for child in children:
            child.stop(timeout_s=0.0)
        raise
    found = gather(process_group, [child.endpoint for child in children])
    workers = len(found)
    endpoints = [found[index % workers][index // workers] for index in range(spec.aggregators)]
    return Aggregators(_ways(network, endpoints), keys.passes, children)


def _hand_out_keys(process_group: dist.ProcessGroup, numbers: Numbers, network: Network, aggregators: int) -> _Keys:
    """Return this rank's keys, from the key file that all have, or from a secret that rank 0 alone knows."""
    rank, workers = numbers.worker, numbers.workers

    def keys_of(rank: int, secret: Secret) -> _Keys:
        started = range(rank, 0 if network.endpoints else aggregators, workers)
        return _Keys(
            [secret.pass_of(rank, index, encrypt=network.encrypt) for index in range(aggregators)],
            {index: secret.door_of(index, workers, encrypt=network.encrypt) for index in started},
        )

    with agree(process_group):
        if numbers.given and not network.endpoints:
            raise ConfigError(
                "endpoints: expected aggregators that run already where workers' numbers are given, got none, and no "
                "process group of all workers over which a new one could be made known: Network(endpoints=..., "
                "key_file=...), or start the script with `qgc run`"
            )
        if network.endpoints and len(network.endpoints) != aggregators:
            raise ConfigError(
                f"endpoints: expected one for each of the {aggregators} aggregators, got {len(network.endpoints)}: "
                f"QGCState(aggregators={len(network.endpoints)}) for these"
            )
        secret = _given_secret(network)
    given = gather(process_group, "none" if secret is None else secret.fingerprint)
    for other, fingerprint in enumerate(given):
        if fingerprint != given[0]:
            raise ConfigError(
                f"key_file: expected the same key on every rank, got {given[0]} on rank 0 and {fingerprint} on rank "
                f"{other} (fingerprints): copy the file that `qgc keygen` has made to every machine"
            )
    if secret is not None:
        return keys_of(rank, secret)
    made = Secret.make()
    keys: _Keys = scatter(process_group, [keys_of(k, made) for k in range(workers)] if rank == 0 else None)
    return keys


def _given_secret(network: Network) -> Secret | None:
    path = network.key_file
    if path is None and network.endpoints:
        path = os.environ.get(KEY_FILE_VARIABLE)
        if path is None:
            raise ConfigError(
                f"key_file: expected the key of the aggregators that run already, got none: {SHARE_A_KEY}"
            )
    return None if path is None else Secret.load(path)


def _host(network: Network, machines: Sequence[str]) -> str:
    """Return the address on which an aggregator of this rank listens."""
    if len(machines) == 1:
        return _LOOPBACK if network.host is None else network.host
    found = _address_towards(os.environ.get("MASTER_ADDR", "")) if network.host is None else network.host
    if is_loopback(found):
        raise ConfigError(
            f"host: the ranks run on {len(machines)} machines ({', '.join(machines[:4])}), but the aggregator would "
            f"listen on {found}, which is {socket.gethostname()} alone: Network(host=<an address of it that the others "
            "reach>)"
        )
    return found


def _address_towards(other: str) -> str:
    """Return the address from which this machine sends to another one; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 1))
            return str(probe.getsockname()[0])
    except OSError:
        return _LOOPBACK


def _ways(network: Network, endpoints: Sequence[str]) -> list[str]:
    return [endpoint if network.through is None else network.through(endpoint) for endpoint in endpoints]
