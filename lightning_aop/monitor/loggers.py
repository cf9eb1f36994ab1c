"""Give a picture to whatever logger the user has: the only file that knows a vendor.

A logger is known by the names of its classes and of their packages, not by the classes themselves:
`pytorch_lightning` and `lightning.pytorch` have distinct classes for the same logger, and neither's
vendor need be installed. Nothing of a vendor is imported before the user has such a logger.
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.view.png import png, write_png

__all__ = ["log_image"]

Adapter: TypeAlias = Callable[[Any, str, Tensor, int, str | None], None]


def log_image(
    logger: object,
    tag: str,
    image: UInt8[Tensor, "3 h w"],
    step: int,
    fallback: str | Path | None = None,
    *,
    caption: str | None = None,
) -> Path | None:
    """Log `image` under `tag` at `step`; return the PNG's path where it became a file.

    1. The loggers of TensorBoard, W&B, MLflow, Comet, Lightning AI (LitLogger), Aim, DVCLive and
       SwanLab, and what is derived from them, hold the picture themselves, pixel by pixel, beside the
       scalars of the same step.
    2. So does any logger with a `log_image` like that of W&B, or an experiment with `add_image`.
    3. For any other it is written as `images/TAG/step-00000120.png` into the logger's directory, or
       into `fallback` if it has none.

    W&B, Comet, LitLogger, Aim and SwanLab hold the caption with the picture, as does a `log_image` that
    takes one. MLflow gets it as the artifact `captions/TAG/step-00000120.txt`. The others have no place
    for it. ClearML takes what TensorBoard is given.

    Returns:
        The path of the file, or None where the logger holds the picture.

    Raises:
        ValueError: the logger can't hold pictures and has no directory, and there is no fallback.
        RuntimeError: Comet took no picture.
        Exception: whatever the logger raises, when its server can't be reached for example.
    """
    if adapter := _adapter(logger):
        adapter(logger, tag, image, step, caption)
        return None
    directory = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or fallback
    if directory is None:
        raise InvalidValueError(
            f"{type(logger).__name__} can't hold pictures and has no directory to write them to: "
            "give it a save_dir, or add a TensorBoardLogger or CSVLogger to the trainer"
        )
    return write_png(image, Path(directory) / "images" / tag / f"step-{step:08d}.png")


def lay_out_charts(loggers: Sequence[object], prefixes: Sequence[str]) -> None:
    """Let TensorBoard's custom scalars show the overall AUC and that of its controls in one chart.

    A layout of the user's own, written later in the same run, takes its place.

    Args:
        loggers: the trainer's; those without such layouts are left alone.
        prefixes: of the scalars of each monitor, such as "explain/".
    """
    charts = {
        prefix.strip("/"): {
            "overall AUC and its controls": [
                "Multiline",
                [f"^{re.escape(prefix)}overall_auc(_random_map|_centre_gaussian)?$"],
            ],
            "deletion and insertion AUC": [
                "Multiline",
                [f"^{re.escape(prefix)}(deletion|insertion)_auc$"],
            ],
        }
        for prefix in prefixes
    }
    for logger in loggers:
        lay_out = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
        if any(_adapter_of(cls) is _log_tensorboard for cls in type(logger).__mro__) and lay_out:
            lay_out(charts)


def has_tables(logger: object) -> bool:
    """Tell whether `log_table` does anything for a logger."""
    return any(cls.__name__ == "WandbLogger" and _adapter_of(cls) for cls in type(logger).__mro__)


def log_table(
    logger: object,
    tag: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    step: int,
) -> bool:
    """Log a table under `tag` at `step` to a logger that has tables, which is W&B's alone.

    A cell that is a uint8 array of shape [h, w, 3] becomes a picture in the table.

    Returns:
        Whether the logger holds the table; False for one without tables, which is left alone.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
        Exception: whatever the logger raises.
    """
    if not has_tables(logger):
        return False
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise InvalidValueError(
            f"a row of table {tag} has {len(wrong[0])} cells for {len(columns)} columns: "
            "give each row one cell for each column"
        )
    wandb_logger: Any = logger
    cells = [[_cell(cell) for cell in row] for row in rows]
    wandb_logger.log_table(key=tag, columns=list(columns), data=cells, step=step)
    return True


def log_lines(
    logger: object,
    tag: str,
    title: str,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    step: int,
) -> bool:
    """Log a chart with a line for each name, of steps and values, to a logger that has tables.

    Returns:
        Whether the logger holds the chart; False for one without tables, which is left alone.

    Raises:
        Exception: whatever the logger raises.
    """
    if not has_tables(logger) or not lines:
        return False
    import wandb

    wandb_logger: Any = logger
    steps, values = zip(*lines.values(), strict=True)
    chart = wandb.plot.line_series(
        xs=[list(each) for each in steps],
        ys=[list(each) for each in values],
        keys=list(lines),
        title=title,
        xname="step",
    )
    wandb_logger.log_metrics({tag: chart}, step=step)
    return True


def _cell(value: object) -> object:
    if not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3):
        return value
    import wandb

    return wandb.Image(Image.fromarray(value))


# --------------------------------------------------------------------------------------------------
# one adapter for each kind of logger


def _adapter(logger: object) -> Adapter | None:
    # The nearest class decides: a user's own `log_image` on top of a known logger is what is meant.
    for cls in type(logger).__mro__:
        if known := _adapter_of(cls):
            return known
        if "log_image" in vars(cls):
            break
    if callable(getattr(logger, "log_image", None)):
        return _log_own
    if callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
        return _log_tensorboard
    return None


def _log_tensorboard(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    experiment, tag = logger.experiment, _prefixed(logger, tag)
    torchs: Any = sys.modules.get("torch.utils.tensorboard.writer")
    plain = (
        torchs and getattr(type(experiment), "add_image", None) is torchs.SummaryWriter.add_image
    )
    if not plain or experiment.file_writer is None:
        experiment.add_image(tag, image, step)
        return
    # What `add_image` writes, but for its PNG, which takes longer than all of the drawing.
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = image.shape[1:]
    held = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(image))
    summary = Summary(value=[Summary.Value(tag=tag, image=held)])
    experiment.file_writer.add_summary(summary, step)


def _log_wandb(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    # `step` goes into "trainer/global_step", the axis of Lightning's scalars. W&B's own counter, which
    # drops what comes late, is left to count.
    captions = {} if caption is None else {"caption": [caption]}
    # Older releases take an array that is almost black for one of numbers from 0 to 1.
    logger.log_image(key=tag, images=[_picture(image)], step=step, **captions)


def _log_mlflow(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    client, run = logger.experiment, logger.run_id
    # As Lightning does with names of metrics: MLflow raises at other characters.
    key = re.sub(r"[^a-zA-Z0-9_/. -]+", "", _prefixed(logger, tag))
    # MLflow 2 stores a picture whose key has a slash, and then refuses to give it back.
    client.log_image(run, _picture(image), key=key.replace("/", "."), step=step)
    if caption is not None:
        client.log_text(run, caption, f"captions/{key}/step-{step:08d}.txt")


def _log_comet(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    metadata = None if caption is None else {"caption": caption}
    # An array would be stretched to the whole range of brightness.
    stored = logger.experiment.log_image(
        _picture(image), name=_prefixed(logger, tag, "_"), step=step, metadata=metadata
    )
    if stored is None:  # Comet writes its troubles to its own log and goes on
        raise RuntimeError(
            "Comet took no picture: its own messages say why. CometLogger(online=False) of Lightning "
            "2.6 switches Comet off altogether: for an offline experiment set COMET_START_ONLINE=0"
        )


def _log_lit(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    import litlogger

    picture = litlogger.Image(_picture(image), description=caption or "")
    logger.experiment[_prefixed(logger, tag)].append(picture, step=step)


def _log_aim(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    import aim

    # Losslessly: by default Aim keeps a picture as it comes, and asks for its format.
    picture = aim.Image(_picture(image), caption=caption or "", format="png")
    logger.experiment.track(picture, name=tag, step=step)


def _log_dvclive(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    # A folder of files that are named by their steps gets a slider in DVC's views.
    logger.experiment.log_image(f"{_prefixed(logger, tag)}/{step}.png", _picture(image))


def _log_own(logger: Any, tag: str, image: Tensor, step: int, caption: str | None) -> None:
    pictures, captions = [image.permute(1, 2, 0).cpu().numpy()], {}
    if caption is not None and _takes_caption(logger.log_image):
        captions = {"caption": [caption]}
    logger.log_image(key=tag, images=pictures, step=step, **captions)


_LIGHTNING = ("lightning", "pytorch_lightning")
_ADAPTERS: dict[str, tuple[tuple[str, ...], Adapter]] = {
    "TensorBoardLogger": (_LIGHTNING, _log_tensorboard),
    "WandbLogger": (_LIGHTNING, _log_wandb),
    "MLFlowLogger": (_LIGHTNING, _log_mlflow),
    "CometLogger": (_LIGHTNING, _log_comet),
    "LitLogger": (_LIGHTNING, _log_lit),
    "AimLogger": (("aim",), _log_aim),
    "DVCLiveLogger": (("dvclive",), _log_dvclive),
    "SwanLabLogger": (("swanlab",), _log_wandb),  # its `log_image` is of the same form
}


def _adapter_of(cls: type) -> Adapter | None:
    packages, adapter = _ADAPTERS.get(cls.__name__, ((), None))
    return adapter if cls.__module__.partition(".")[0] in packages else None


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def _prefixed(logger: Any, tag: str, join: str = "-") -> str:
    # Lightning puts the logger's `prefix` before the names of scalars.
    prefix = getattr(logger, "_prefix", None)
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', join)}{tag}" if prefix else tag


def _takes_caption(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "caption" or p.kind is p.VAR_KEYWORD for p in parameters)
