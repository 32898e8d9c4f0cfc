"""5,000 real handwritten digits for the two scripts beside this file."""

import sys
from pathlib import Path

from torch.utils.data import TensorDataset

EXAMPLES = Path(__file__).resolve().parent.parent


def handwritten_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 4,000 digits for training and 1,000 for validation: images [1, 28, 28] float32, labels int64."""
    sys.path.append(str(EXAMPLES))
    from common import digits

    return digits.datasets(EXAMPLES.parent / "data")
