"""The key that all jobs in tests have, unless they are about keys."""

from torch_qgc.protocol.identity import Door, Pass, Secret

SECRET = Secret(b"the secret of all jobs in tests!")


def door(index: int = 0, workers: int = 16, *, secret: Secret = SECRET, encrypt: bool = True) -> Door:
    """Return an aggregator's door."""
    return secret.door_of(index, workers, encrypt=encrypt)


def passes(worker: int, count: int = 1, *, secret: Secret = SECRET, encrypt: bool = True) -> list[Pass]:
    """Return what a worker shows to that many aggregators."""
    return [secret.pass_of(worker, index, encrypt=encrypt) for index in range(count)]
