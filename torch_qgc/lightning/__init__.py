"""Lightning: `Trainer(strategy="qgc")` or `Trainer(strategy=QGCStrategy(...))`. It needs `torch_qgc[lightning]`."""

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"torch_qgc.lightning: expected Lightning, got no module {error.name!r}: pip install 'torch_qgc[lightning]'",
        name=error.name,
    ) from error

from lightning.pytorch.strategies import StrategyRegistry

from torch_qgc.lightning.monitor import QGCMonitor
from torch_qgc.lightning.strategy import QGCStrategy

__all__ = ["QGCMonitor", "QGCStrategy"]

QGCStrategy.register_strategies(StrategyRegistry)
