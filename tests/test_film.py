"""The film of a run has a frame for each record, which shows what was found then."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_aop.film import film_frames, write_film
from lightning_aop.history import History, HistoryWriter, Record


def run(folder: Path, records: int) -> History:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=generator)
    writer = HistoryWriter(folder, images, configuration={}, class_names={0: "cat"})
    for step in range(records):
        maps = torch.zeros(2, 12, 12, dtype=torch.uint8)
        maps[:, step % 12] = 255  # a bar that moves down
        writer.add(
            Record(
                step=step,
                epoch=step,
                title=f"epoch {step}",
                values={"overall_auc": 0.1 * step},
                images=[0, 1],
                targets=[0, 7],
                scores=[0.5, 0.25],
                blank=[False, False],
                drift=[None, None],
            ),
            maps,
        )
    return History.load(folder)


def test_a_frame_for_each_record(tmp_path: Path) -> None:
    history = run(tmp_path, 5)
    path = write_film(tmp_path, seconds=0.2, cell=48)
    assert path == tmp_path / "evolution.gif"
    frames = [frame.permute(1, 2, 0).numpy() for frame in film_frames(history, cell=48)]
    with Image.open(path) as film:
        assert (film.n_frames, film.info["loop"]) == (5, 0)
        for n, frame in enumerate(frames):
            film.seek(n)
            assert film.info["duration"] == (3000 if n == 4 else 200)
            seen = np.asarray(film.convert("RGB")).astype(float)
            assert np.abs(seen - frame).mean() < 12  # of 255, in noise of all colours
    # What moves is the heat, and the title.
    moved = [np.abs(a.astype(int) - b).sum(axis=(1, 2)) for a, b in pairwise(frames)]
    assert all(rows.any() for rows in moved)


def test_what_was_not_explained_at_some_time_is_labelled(tmp_path: Path) -> None:
    history = run(tmp_path, 2)
    history.records[0].images.pop()
    history.records[0].targets.pop()
    first, last = film_frames(history, cell=48)
    assert first.shape == last.shape
    assert not torch.equal(first, last)


def test_a_run_without_records_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, 0)
    with pytest.raises(ValueError, match="no record yet"):
        write_film(tmp_path)
