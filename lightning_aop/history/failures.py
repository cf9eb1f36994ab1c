"""The failures of a run over its validations: which samples, why, from when until when.

The file `failures.jsonl` has a line for each time at which they were explained, a `FailureRecord`. An
image is in the line of its first time, PNG as a data URL, as every map is: a page needs nothing else.
"""

import base64
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["FailureRecord", "picture_of", "read_failures"]

NAME = "failures.jsonl"


@dataclass(frozen=True)
class FailureRecord:
    """The failures at one time.

    Attributes:
        step: the one that the loggers show.
        epoch: which one, from 0.
        title: when, in words.
        samples: the worst first, each a dictionary of `id`, the same as long as the image is;
            `loader` and `index`, where validation has it; `why` it was chosen, in words; `loss`;
            `labels`, class indices; `predicted`; `entered`, the title of the time when it came; and
            `targets`, the classes explained, with their `scores` and `maps`.
        left: those that are here no longer, each with its `id`, `entered` and `left`.
        images: by `id`, those that were in no record before.
    """

    step: int
    epoch: int
    title: str
    samples: list[dict[str, Any]]
    left: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)


def read_failures(folder: Path) -> list[FailureRecord]:
    """Return the records of a run's folder that can be read; none where there is no file."""
    records = []
    for line in lines_of(folder / NAME):
        try:
            records.append(FailureRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def lines_of(path: Path) -> list[bytes]:
    """Return the whole lines of a file; a process that was killed leaves a last one without its end."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def line_of(record: FailureRecord) -> bytes:
    """Return the record as it is stored."""
    return json.dumps(asdict(record)).encode() + b"\n"


def url_of(picture: UInt8[np.ndarray, "y x *c"]) -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_of(url: str) -> UInt8[np.ndarray, "y x *c"]:
    """Return the picture of a data URL: an image [H, W, 3], or a map [h, w] with 255 for 1."""
    content = base64.b64decode(url.partition(",")[2])
    return np.array(Image.open(io.BytesIO(content)))
