"""The animation of a run has a frame for each record, with the maps of that time."""

import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from lightning_aop.history.animation import _BAR, _palette, animation_frames, write_animation
from lightning_aop.history.store import History, HistoryWriter, Record


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
                deletion_auc=[None, None],
                insertion_auc=[None, None],
            ),
            maps,
        )
    return History.load(folder)


def test_a_frame_for_each_record(tmp_path: Path) -> None:
    history = run(tmp_path, 5)
    path = write_animation(tmp_path, seconds=0.2, cell=48)[0]
    assert path == tmp_path / "evolution.gif"
    frames = [frame.permute(1, 2, 0).numpy() for frame in animation_frames(history, cell=48)]
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (5, 0)
        for n, frame in enumerate(frames):
            animation.seek(n)
            assert animation.info["duration"] == (3000 if n == 4 else 200)
            seen = np.asarray(animation.convert("RGB")).astype(float)
            assert np.abs(seen - frame).mean() < 12  # of 255, in noise of all colours
            # The colour bar, which has a hundredth of the pixels, has its colours.
            bar = np.abs(seen - frame)[-28:-18, -160:-24]
            assert bar.mean() < 1.5
    # What moves is the heat, and the title.
    moved = [np.abs(a.astype(int) - b).sum(axis=(1, 2)) for a, b in pairwise(frames)]
    assert all(rows.any() for rows in moved)


def test_what_stays_the_same_does_not_flicker(tmp_path: Path) -> None:
    history = run(tmp_path, 4)
    path = write_animation(tmp_path, cell=48)[0]
    first, *others = [
        frame.permute(1, 2, 0).numpy() for frame in animation_frames(history, cell=48)
    ]
    with Image.open(path) as animation:
        begin = np.asarray(animation.convert("RGB"))
        for n, frame in enumerate(others, start=1):
            animation.seek(n)
            same = (frame == first).all(axis=2)
            assert 0.3 < same.mean() < 1
            assert np.array_equal(np.asarray(animation.convert("RGB"))[same], begin[same])


def test_the_colours_are_nearly_the_best(tmp_path: Path) -> None:
    """Within a twentieth of what k-means finds for photos if it goes on to the end, on every pixel."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    frames = [Image.fromarray(photo).resize((192, 192)) for photo in photos]
    strip = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    best = strip.quantize(256 - _BAR, Image.Quantize.MEDIANCUT, kmeans=1)

    def error(palette: Image.Image) -> float:
        shown = strip.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
        return float(np.abs(np.asarray(shown).astype(float) - np.asarray(strip)).mean())

    assert error(_palette(frames)) < 1.05 * error(best)


def test_masks_are_outlined(tmp_path: Path) -> None:
    plain = run(tmp_path, 1)
    mask = np.zeros((48, 48), dtype=bool)
    mask[10:30, 10:30] = True
    (bare,), (lined,) = (
        list(animation_frames(replace(plain, masks=masks), cell=48))
        for masks in ({}, {(1, 7): mask})
    )
    cyan = torch.tensor([76, 242, 255])[:, None, None]
    assert not (bare == cyan).all(0).any()
    # The border of 20 x 20 on the input and the overlay, and a line in the legend.
    found = (lined == cyan).all(0)
    assert 2 * 76 < int(found.sum()) < 2 * 76 + 200


def test_the_mp4_holds_the_same_frames(tmp_path: Path) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    history = run(tmp_path, 5)
    _, path = write_animation(tmp_path, seconds=0.5, cell=49)
    assert path == tmp_path / "evolution.mp4"
    frames = [frame.permute(1, 2, 0).numpy() for frame in animation_frames(history, cell=49)]
    height, width = (side + side % 2 for side in frames[0].shape[:2])
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(list(map(str, command)), capture_output=True, check=True)
    seen = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3).astype(float)
    assert len(seen) == 5 + 5  # the last one stays for three seconds
    for got, frame in zip(seen, [*frames, *[frames[-1]] * 5], strict=True):
        rows, columns = frame.shape[:2]
        assert np.abs(got[:rows, :columns] - frame).mean() < 12  # of 255, in noise of all colours
        assert (got[rows:] < 60).all()


def test_without_h264_the_mp4_is_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, probe = shutil.which("ffmpeg"), shutil.which("ffprobe")
    if real is None or probe is None:
        pytest.skip("ffmpeg is not installed")
    lacking = tmp_path / "bin" / "ffmpeg"
    lacking.parent.mkdir()
    lacking.write_text(f'#!/bin/sh\ncase " $* " in *" h264 "*) exit 1;; esac\nexec {real} "$@"\n')
    lacking.chmod(0o755)
    monkeypatch.setenv("PATH", str(lacking.parent), prepend=":")
    history = run(tmp_path / "run", 2)
    _, path = write_animation(tmp_path / "run", seconds=1, cell=48)
    show = [probe, "-v", "error", "-show_entries", "stream=codec_name", "-of", "csv=p=0", str(path)]
    assert subprocess.run(show, capture_output=True, check=True).stdout.strip() == b"mpeg4"
    command = [real, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(command, capture_output=True, check=True).stdout
    frames = [frame.permute(1, 2, 0).numpy() for frame in animation_frames(history, cell=48)]
    rows, columns = frames[0].shape[:2]
    seen = (
        np.frombuffer(pixels, np.uint8)
        .reshape(-1, rows + rows % 2, columns + columns % 2, 3)
        .astype(float)
    )
    assert len(seen) == 2 + 2  # the last one stays for three seconds
    for got, frame in zip(seen, [*frames, *[frames[-1]] * 2], strict=True):
        assert np.abs(got[:rows, :columns] - frame).mean() < 12  # of 255, in noise of all colours


@pytest.mark.parametrize("script", ["echo no encoder >&2; exit 1", "exit 0"])
def test_a_broken_encoder_costs_only_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    broken = tmp_path / "bin" / "ffmpeg"
    broken.parent.mkdir()
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent), prepend=":")
    run(tmp_path / "run", 2)
    with pytest.warns(
        UserWarning, match="could not write evolution.mp4.*(no encoder|No such file)"
    ):
        paths = write_animation(tmp_path / "run", cell=48)
    assert paths == [tmp_path / "run" / "evolution.gif"]
    assert not (tmp_path / "run" / "evolution.mp4").exists()


def test_what_was_not_explained_at_some_time_is_labelled(tmp_path: Path) -> None:
    history = run(tmp_path, 2)
    history.records[0].images.pop()
    history.records[0].targets.pop()
    first, last = animation_frames(history, cell=48)
    assert first.shape == last.shape
    assert not torch.equal(first, last)


@pytest.mark.wide
def test_a_long_run_is_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    history = run(tmp_path, 250)
    with Image.open(write_animation(tmp_path, cell=32)[0]) as animation:
        assert animation.n_frames == 120
        animation.seek(119)
        seen = np.asarray(animation.convert("RGB")).astype(float)
    last = list(animation_frames(replace(history, records=history.records[-1:]), cell=32))
    assert np.abs(seen - last[0].permute(1, 2, 0).numpy()).mean() < 12
    with pytest.raises(ValueError, match="seconds must be above 0"):
        write_animation(tmp_path, seconds=0)


def test_a_run_without_records_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, 0)
    with pytest.raises(ValueError, match="no record yet"):
        write_animation(tmp_path)
