"""The error tree. Every message says what was expected, what came, where, and what to do about it."""

__all__ = [
    "CodecError",
    "CollectiveFailed",
    "ConfigError",
    "JobFailed",
    "PlanError",
    "ProtocolError",
    "QGCError",
    "Refused",
]


class QGCError(Exception):
    """Root of all errors raised by torch_qgc."""


class ConfigError(QGCError, ValueError):
    """An argument, or something about the model or the process group, that cannot work."""


class PlanError(QGCError, ValueError):
    """Straggle probabilities, budgets or placements from which no valid plan can be made."""


class CodecError(QGCError, ValueError):
    """A tensor or payload that the codec cannot take."""


class ProtocolError(QGCError, ValueError):
    """A message that does not follow the wire format."""


class Refused(QGCError, RuntimeError):
    """The aggregator does not let this worker join; the message names the remedy."""


class JobFailed(QGCError, RuntimeError):
    """The job stopped on every rank: one worker failed, replicas differ, or the aggregator is gone."""


class CollectiveFailed(QGCError, RuntimeError):
    """Workers did not meet: some did not come in time, called something else, or went on without this one."""
