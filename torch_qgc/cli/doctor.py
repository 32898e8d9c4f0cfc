"""What there is on this machine."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["examine"]

_PACKAGES = ("torch", "numpy", "scipy", "msgspec", "pyzmq", "triton", "lightning", "matplotlib")


def examine() -> dict[str, str]:
    """Return what matters for a bug report, by name: versions, kernels, devices."""
    import torch

    import torch_qgc
    from torch_qgc import kernels

    facts = {"torch_qgc": torch_qgc.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["torch"] = torch.__version__  # with its local part, which says for which CUDA it was built
    facts |= {f"kernels on {device}": what for device, what in kernels.report().items()}
    facts["cpu threads"] = str(torch.get_num_threads())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["cuda devices"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    return facts
