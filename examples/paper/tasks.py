"""Every task by the name the config uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paper import classification, detectors, language
from paper.task import Task

#: name -> (folder of downloads and data sets) -> task. COCO is looked for in its subfolder `coco`.
TASKS: dict[str, Callable[[Path], Task]] = {
    "digits": classification.digits,
    "digits_resnet": classification.digits_resnet,
    "text": language.text,
    "digits_detection": detectors.digits_detection,
    "coco": detectors.coco,
    "coco_resnet": detectors.coco_resnet,
    "text_gpt2": language.text_gpt2,
}
