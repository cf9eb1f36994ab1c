import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_aop.image_log import log_image


@pytest.fixture
def picture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator)


def pixels(picture: Tensor) -> Any:
    return picture.permute(1, 2, 0).numpy()


def test_tensorboard_holds_the_very_pixels(picture: Tensor, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert log_image(logger, "explain/heatmaps", picture, 12) is None
    logger.finalize("success")
    (event,) = EventAccumulator(logger.log_dir, {"images": 0}).Reload().Images("explain/heatmaps")
    assert event.step == 12
    with Image.open(io.BytesIO(event.encoded_image_string)) as stored:
        np.testing.assert_array_equal(np.asarray(stored), pixels(picture))


def test_a_logger_without_pictures_gets_files(picture: Tensor, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    path = log_image(logger, "explain/heatmaps", picture, 12)
    assert path == Path(logger.log_dir) / "images" / "explain/heatmaps" / "step-00000012.png"
    with Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(stored), pixels(picture))


def test_a_logger_with_log_image_is_asked_first(picture: Tensor) -> None:
    calls: list[Any] = []

    class Own:
        def log_image(self, key: str, images: list[Any], step: int) -> None:
            calls.append((key, images[0], step))

    log_image(Own(), "a/b", picture, 3)
    ((key, image, step),) = calls
    assert (key, step) == ("a/b", 3)
    np.testing.assert_array_equal(image, pixels(picture))


def test_a_logger_without_a_directory(picture: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"object can't hold pictures and has no directory.*give"):
        log_image(object(), "a", picture, 0)
    assert log_image(object(), "a", picture, 0, fallback=tmp_path) is not None
