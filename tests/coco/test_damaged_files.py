"""Annotations with bytes changed at random: an error that helps or a data set."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import bounded, mutated
from PIL import Image

from lightning_aop.coco import CocoMultilabel, Preprocess
from lightning_aop.errors import UserError

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONTENT: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 16} for i in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "iscrowd": 0,
         "segmentation": [[2, 2, 11.5, 2, 11.5, 11, 2, 11]]},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [0, 0, 4, 4], "iscrowd": 1,
         "segmentation": {"size": [16, 24], "counts": [0, 40, 344]}},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 0,
         "segmentation": {"size": [16, 24], "counts": "0X1X:"}},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
}  # fmt: skip
FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "UTF-16": lambda text: text.encode("utf-16"),
    "packed": lambda text: gzip.compress(text.encode(), mtime=0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_bytes_are_survived(form: str, count: int, tmp_path: Path) -> None:
    for i in (1, 2):
        Image.new("RGB", (24, 16)).save(tmp_path / f"{i}.png")
    content, file = FORMS[form](json.dumps(CONTENT)), tmp_path / "export.json"
    transform, outcomes = Preprocess(16), {"read": 0, "refused": 0}
    for seed in range(count):
        draw = random.Random(seed)
        file.write_bytes(mutated(content, draw))
        options: dict[str, Any] = {"on_error": draw.choice(["raise", "skip"])}
        message, boxes = str(file), draw.random() < 0.5
        try:
            with bounded():
                data = CocoMultilabel(tmp_path, file, transform, **options)
                assert data.labels.shape == (len(data), len(data.classes)), seed
                for index in range(len(data)):
                    image, labels = data[index]
                    assert image.shape == (3, 16, 16), seed
                    assert labels.shape == (len(data.classes),), seed
                    masks = data.masks(index, boxes=boxes)
                    assert masks.shape[0] == len(labels), seed
            outcomes["read"] += 1
        except UserError as error:
            message = str(error)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert str(file) in message, seed
        assert len(message) < 1000, seed
    assert outcomes["refused"] > count / 10
    assert form == "packed" or outcomes["read"] > 0
