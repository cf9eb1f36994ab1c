"""Write the scores of every image to a CSV file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_aop.tables import csv_text


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.csv`: a row for each image, with its file and the score of each class.

    Rows are written batch by batch. Each of several processes writes its own file,
    `predictions-0.csv` and so on.

    Args:
        folder: where to; by default the logger's, or the trainer's `default_root_dir`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._path: Path | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the file with its header."""
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = folder / f"predictions{suffix}.csv"
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            file.write(csv_text([["file", *data.classes]]))

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add a batch."""
        assert self._path is not None
        assert batch_indices is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        files = data.dataset("val").files
        with self._path.open("a", newline="", encoding="utf-8") as file:
            file.write(
                csv_text(
                    [files[index], *(f"{score:.6f}" for score in scores)]
                    for index, scores, label in zip(
                        batch_indices, prediction.tolist(), batch[1][:, 0].tolist(), strict=True
                    )
                    if label >= 0  # else the image could not be read
                )
            )

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the scores are."""
        print(f"wrote {self._path}")
