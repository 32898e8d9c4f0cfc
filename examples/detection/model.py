"""SSDLite with a MobileNetV3 backbone, built from torchvision's parts and trained from scratch."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor, _normal_init

BACKBONES = {"small": mobilenet_v3_small, "large": mobilenet_v3_large}
LEVELS = 6  # feature maps that the head reads: two of the backbone, four more behind it


def build_model(num_labels: int, *, backbone: str = "small", size: int = 160) -> SSD:
    """Build torchvision's `ssdlite320_mobilenet_v3_large` for another backbone and another input size.

    `large` at 320 pixels is that model. Nothing is pretrained.

    Args:
        num_labels: background included.
        backbone: "small" or "large".
        size: side in pixels to which images are resized.
    Returns:
        a model that takes images and targets as torchvision's detectors do: losses in training, detections
        otherwise.
    """
    # More momentum than torchvision's 0.03: in a few hundred steps the running statistics must settle.
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    network = BACKBONES[backbone](weights=None, norm_layer=norm_layer, reduced_tail=True)
    _normal_init(network)
    features = _mobilenet_extractor(network, trainable_layers=LEVELS, norm_layer=norm_layer)
    anchors = DefaultBoxGenerator([[2, 3]] * LEVELS, min_ratio=0.2, max_ratio=0.95)
    channels = detection_utils.retrieve_out_channels(features, (size, size))
    features.register_forward_pre_hook(_channels_last)  # on CPU a step takes a third less time
    return SSD(
        features,
        anchors,
        (size, size),
        num_labels,
        head=SSDLiteHead(channels, anchors.num_anchors_per_location(), num_labels, norm_layer),
        score_thresh=0.01,
        nms_thresh=0.55,
        detections_per_img=100,
        topk_candidates=100,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _channels_last(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)
