"""Give a picture to whatever logger the user has: the only file that knows a vendor.

Loggers are told apart by what they can do, not by their class: `pytorch_lightning` and
`lightning.pytorch` have distinct classes for the same logger.
"""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from lightning_aop.rendering import write_png


def log_image(
    logger: object,
    tag: str,
    image: UInt8[Tensor, "3 h w"],
    step: int,
    fallback: str | Path | None = None,
) -> Path | None:
    """Log `image` under `tag` at `step`; return the PNG's path where it became a file.

    A logger with `log_image` (W&B) or an experiment with `add_image` (TensorBoard) holds the picture
    itself. For any other it is written as `images/TAG/step-00000120.png` into the logger's directory,
    or into `fallback` if it has none.

    Raises:
        ValueError: the logger can't hold pictures and has no directory, and there is no fallback.
    """
    if callable(log := getattr(logger, "log_image", None)):
        log(key=tag, images=[image.permute(1, 2, 0).cpu().numpy()], step=step)
        return None
    if callable(add := getattr(getattr(logger, "experiment", None), "add_image", None)):
        add(tag, image, step)
        return None
    directory = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or fallback
    if directory is None:
        raise ValueError(
            f"{type(logger).__name__} can't hold pictures and has no directory to write them to: "
            "give it a save_dir, or add a TensorBoardLogger or CSVLogger to the trainer"
        )
    return write_png(image, Path(directory) / "images" / tag / f"step-{step:08d}.png")
