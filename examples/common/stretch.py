"""A data set in stretches: as many samples as there are to train on between two evaluations."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset


class Stretch(Dataset[Any]):
    """The samples of one stretch of a job, `samples` of them; `move` goes on to another.

    All stretches together run through one permutation of the data after the other, so that every sample is met once
    per epoch of the data, however long a stretch is. A loader over a stretch calls that one an epoch.

    Args:
        data: a map-style data set.
        samples: per stretch, of all workers together.
        seed: of the permutations.
    """

    def __init__(self, data: Dataset[Any], samples: int, *, seed: int) -> None:
        self._data, self._samples, self._seed = data, samples, seed
        self.move(0)

    def move(self, number: int) -> None:
        """Go to a stretch; the first is number 0."""
        length = len(self._data)
        places = np.arange(number * self._samples, (number + 1) * self._samples)
        epochs, places = places // length, places % length
        orders = {epoch: np.random.default_rng([self._seed, epoch]).permutation(length) for epoch in np.unique(epochs)}
        self.indices = [int(orders[epoch][place]) for epoch, place in zip(epochs, places)]

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        return self._data[self.indices[index]]
