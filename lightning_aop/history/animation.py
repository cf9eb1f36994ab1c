"""The maps of a run as an animation: `evolution.gif`, and `evolution.mp4` with ffmpeg."""

import io
import math
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.checks import require_positive
from lightning_aop.errors import InvalidValueError
from lightning_aop.files import write_whole
from lightning_aop.history.store import History, Record
from lightning_aop.tables import decimals
from lightning_aop.view.grid import heatmap_grid
from lightning_aop.view.heat import overlay
from lightning_aop.view.text import PAPER

__all__ = ["write_animation"]

_VALUES = {"overall_auc": "overall AUC", "pointing_game": "pointing game"}
_LAST = 3.0  # seconds
_BAR = 48  # of 256 colours
_SAMPLE = 40_000  # pixels
_FRAMES = 120  # held in memory, 2 MB each


def write_animation(
    folder: str | Path, *, seconds: float = 0.5, explanations: int = 12, cell: int = 128
) -> list[Path]:
    """Write `evolution.gif` into the folder of a run's history, and `evolution.mp4` where ffmpeg is.

    Each frame shows the maps of one record under its epoch and metrics, with the outlines of the
    masks if there are any. All frames show the images and classes of the last record. The last frame
    stays for three seconds. Of a run with more than 120 records, 120 are shown, evenly spaced.

    Args:
        folder: the `explanations` folder that the monitor has written.
        seconds: how long a frame is shown, above 0.
        explanations: the largest number of maps in a frame; the first ones are taken.
        cell: the longer side of an image in the frame, in pixels.

    Returns:
        The paths of the files.

    Raises:
        FileNotFoundError: there is no history in the folder.
        ValueError: the history has no record yet or is damaged, or `seconds` is not above 0.
    """
    require_positive("write_animation", seconds=seconds)
    folder = Path(folder)
    history = History.load(folder)
    if not history.records:
        raise InvalidValueError(
            f"{folder} has no record yet: an animation needs at least one explanation"
        )
    chosen = np.linspace(0, len(history.records) - 1, min(len(history.records), _FRAMES)).round()
    history = replace(history, records=[history.records[int(n)] for n in chosen])
    frames = [
        Image.fromarray(frame.permute(1, 2, 0).numpy())
        for frame in animation_frames(history, explanations, cell)
    ]
    paths = [_write_gif(folder / "evolution.gif", frames, seconds)]
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is not None:
        try:
            paths.append(_write_mp4(folder / "evolution.mp4", frames, seconds, ffmpeg))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            warnings.warn(
                f"{ffmpeg} could not write evolution.mp4, only evolution.gif. {said or error}",
                stacklevel=2,
            )
    return paths


def _write_gif(path: Path, frames: list[Image.Image], seconds: float) -> Path:
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * _LAST)]
    # The colours of one frame are those of all: with a palette for each, flat areas would flicker, as
    # they would with dithering.
    palette = _palette(frames)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    write_whole(path, content.getvalue())
    return path


def _write_mp4(path: Path, frames: list[Image.Image], seconds: float, ffmpeg: str) -> Path:
    """Encode the frames as H.264, or as MPEG-4 where this ffmpeg can't."""
    width, height = frames[0].size
    # H.264 in the colours that every player knows has even sides.
    even = f"pad={width + width % 2}:{height + height % 2}:color=0x{bytes(PAPER).hex()}"
    stay = f"tpad=stop_mode=clone:stop_duration={max(_LAST - seconds, 0)}"
    with tempfile.TemporaryDirectory() as folder:
        made, raw = Path(folder) / path.name, Path(folder) / "frames.rgb"
        with raw.open("wb") as file:
            for frame in frames:
                file.write(frame.tobytes())
        for codec in (("h264",), ("mpeg4", "-q:v", "2")):
            done = subprocess.run(
                [
                    *(ffmpeg, "-loglevel", "error", "-y", "-nostdin"),
                    *("-f", "rawvideo", "-pixel_format", "rgb24"),
                    *("-video_size", f"{width}x{height}", "-framerate", f"{1 / seconds:.6f}"),
                    *("-i", str(raw), "-vf", f"{even},{stay}", "-c:v", *codec),
                    *("-pix_fmt", "yuv420p", "-movflags", "+faststart", str(made)),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60 + len(frames),
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        write_whole(path, made.read_bytes())
    return path


def animation_frames(
    history: History, explanations: int = 12, cell: int = 128
) -> Iterator[UInt8[Tensor, "3 height width"]]:
    """Yield a frame for each record, all of one size."""
    last = history.records[-1]
    pairs = last.pairs[:explanations]
    images = torch.from_numpy(history.images[[image for image, _ in pairs]])
    images = images.permute(0, 3, 1, 2).float() / 255
    outlines = None
    if history.masks:
        none = np.zeros(history.images.shape[1:3], dtype=bool)
        outlines = torch.from_numpy(np.stack([history.masks.get(pair, none) for pair in pairs]))
    for record in history.records:
        places = {pair: place for place, pair in enumerate(record.pairs)}
        maps = np.zeros((len(pairs), *history.maps.shape[1:]), dtype=np.uint8)
        captions = []
        for n, pair in enumerate(pairs):
            place = places.get(pair)
            name = history.class_name(pair[1])
            if place is None:
                captions.append(f"{name}\nnot explained")
                continue
            maps[n] = history.maps[record.first + place]
            captions.append(f"{name}\n{record.scores[place]:.2f}")
        upsampled = interpolate(
            torch.from_numpy(maps)[:, None] / 255, images.shape[2:], mode="bilinear"
        )
        yield heatmap_grid(
            images, upsampled[:, 0], captions, title=_title(record), cell=cell, outlines=outlines
        )


def _title(record: Record) -> str:
    values = [
        f"{shown} {decimals(record.values[name])}"
        for name, shown in _VALUES.items()
        if math.isfinite(record.values.get(name, math.nan))
    ]
    return " · ".join([record.title, *values])


def _palette(frames: list[Image.Image]) -> Image.Image:
    """Return 256 colours for the first, the middle and the last frame, and for the colour bar."""
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    strip = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for n, frame in enumerate(chosen):
        strip.paste(frame, (0, n * frames[0].height))
    # So many pixels name the same colours as all do, in a small part of the time.
    step = math.ceil(math.sqrt(strip.width * strip.height / _SAMPLE))
    size = -(-strip.width // step), -(-strip.height // step)
    strip = strip.resize(size, Image.Resampling.NEAREST)
    # The bar is too small to get colours of its own, and shows bands without.
    bar = overlay(torch.full((1, 3, 1, _BAR), 0.5), torch.linspace(0, 1, _BAR).expand(1, 1, -1))
    # Until a round of k-means moves less than a thousandth of the pixels to another colour.
    moved = strip.width * strip.height // 1000
    colours = strip.quantize(256 - _BAR, Image.Quantize.MEDIANCUT, kmeans=moved + 1)
    levels = (bar[0, :, 0].T * 255).round().int().flatten().tolist()
    palette = Image.new("P", (1, 1))
    palette.putpalette(levels + (colours.getpalette() or [])[: 3 * (256 - _BAR)])
    return palette
