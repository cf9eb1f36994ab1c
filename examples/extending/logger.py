"""A logger of your own: a method `log_image` is all that the monitor needs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class FolderLogger(Logger):
    """Metrics as lines of JSON, overlays as files beside them."""

    name, version = "folder", 0

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keep none."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int, caption: list[str]) -> None:
        """Write the overlays, uint8 [h, w, 3]."""
        for image in images:
            Image.fromarray(image).save(self.folder / f"{key.replace('/', '-')}-{step}.png")
