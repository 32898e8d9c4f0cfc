"""The stand-ins that are cheap enough for many runs: 5,000 real MNIST digits, an MLP and a narrow ResNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import digits as mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import Bottleneck, ResNet

from paper.task import Task, device_of, judging


def digits(data_dir: Path) -> Task:
    """Classify 5,000 MNIST digits with an MLP 784-32-10: 25,450 parameters."""
    return _task(_mlp, data_dir, judged=1000)


def digits_resnet(data_dir: Path) -> Task:
    """Classify the digits with ResNet-50's bottlenecks, one a stage, at 1/8 of its width: 132,714 parameters."""
    return _task(NarrowResNet, data_dir, judged=250)


class NarrowResNet(ResNet):
    """torchvision's ResNet with fewer blocks and channels, for one input channel and small images."""

    def __init__(self, layers: tuple[int, ...] = (1, 1, 1, 1), divisor: int = 8, classes: int = 10) -> None:
        self._divisor = divisor
        super().__init__(Bottleneck, list(layers), num_classes=classes)
        stem, width = 64, 512 * Bottleneck.expansion // divisor
        self.conv1 = nn.Conv2d(1, stem, kernel_size=3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(width, classes)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        return super()._make_layer(block, planes // self._divisor, blocks, stride, dilate)


def classification_loss(network: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross entropy of a batch of images and labels."""
    images, labels = (tensor.to(device_of(network)) for tensor in batch)
    return cross_entropy(network(images), labels)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def _task(build: Callable[[], nn.Module], data_dir: Path, *, judged: int) -> Task:
    train, _ = mnist.datasets(data_dir)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:judged]

    def judge(network: nn.Module) -> float:
        with judging(network):
            return float(classification_loss(network, train[some]))

    return Task(
        build=build,
        loss=classification_loss,
        train=train,
        judge=judge,
    )
