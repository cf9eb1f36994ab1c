"""The pointing game over a data set: what is counted, and runs that stop, resume and are shared out."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import finish
from PIL import Image

from lightning_aop import GradCAM
from lightning_aop.cli.main import main
from lightning_aop.coco import CocoMultilabel, MultilabelClassifier, Preprocess
from lightning_aop.data.digests import described, slug
from lightning_aop.data.shapes import CLASSES, write_shapes
from lightning_aop.experiments import pointing_game
from lightning_aop.experiments.pointing_game import Rules
from lightning_aop.methods.names import METHODS, coco_method

pytest.importorskip("pycocotools")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--data.num_workers=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=48, val=13, size=64)


@pytest.fixture(scope="module")
def checkpoint(root: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that has learnt to see something everywhere, so that many pairs are tested."""
    torch.manual_seed(0)
    model = MultilabelClassifier("squeezenet1_1", str(weights), num_classes=len(CLASSES))
    model.classes = list(CLASSES)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=0.3)
    torch.nn.init.constant_(model.head.bias, 1.0)
    path = tmp_path_factory.mktemp("checkpoint") / "head.ckpt"
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=0)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def words(root: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    return [
        "pointing-game",
        f"--data.root={root}",
        "--data.size=64",
        "--model.backbone=squeezenet1_1",
        f"--ckpt_path={checkpoint}",
        f"--output={output}",
        f"--trainer.default_root_dir={output}",
        *QUIET,
        *more,
    ]


def play(*arguments: Any) -> list[dict[str, Any]]:
    output = arguments[2]
    assert main(words(*arguments)) == 0
    results: list[dict[str, Any]] = json.loads((output / "results.json").read_text())
    return results


def kept(folder: Path) -> dict[str, Any]:
    """Return the finished groups by the names of their files."""
    paths = sorted(folder.rglob("group-*.pt"))
    return {path.stem: torch.load(path, weights_only=True) for path in paths}


def triangles(n: int, size: int) -> np.ndarray:
    """Return the matrix that resamples n pixels to `size`, by triangles as wide as the larger pixel."""
    scale = n / size
    centre = (np.arange(size) + 0.5)[:, None] * scale
    weights = np.clip(1 - abs(np.arange(n) + 0.5 - centre) / max(scale, 1), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def slow_game(
    root: Path, checkpoint: Path, tolerances: Sequence[float]
) -> dict[str, list[list[float]]]:
    """Play TorchRay's rule with loops, at the photo's size: the hits and heat of each pair, by class."""
    model = MultilabelClassifier.load_from_checkpoint(checkpoint, weights=None).eval()
    data = CocoMultilabel.from_root(root, "val2017", Preprocess(64))
    result: dict[str, list[list[float]]] = {}
    for start in range(0, len(data), 8):
        rows = range(start, min(start + 8, len(data)))
        images, labels = (torch.stack(part) for part in zip(*(data[i] for i in rows), strict=True))
        with torch.no_grad():
            scores = model(images).sigmoid()
        at, targets = ((labels == 1) & (scores > 0.5)).nonzero(as_tuple=True)
        maps = GradCAM().explain(model, images[at], targets)
        for i, k, small in zip(at.tolist(), targets.tolist(), maps, strict=True):
            mask = data.masks(rows[i])[k]
            v, u = np.indices(mask.shape)
            rows_of, columns_of = (triangles(64, side) for side in mask.shape)
            found = (rows_of @ small.double().numpy() @ columns_of.T).astype(np.float32)
            values = []
            for tolerance in tolerances:
                ties = []
                for y, x in np.argwhere(found == found.max()):
                    accept = (u - x) ** 2 + (v - y) ** 2 < max(tolerance, 1) ** 2
                    ties.append(bool((mask & accept).any()))
                values.append(float(np.mean(ties)))
            heat = found[mask].sum() / found.sum() if found.any() else 0.0
            result.setdefault(data.classes[k], []).append([*values, float(heat)])
    return result


@pytest.mark.sample(1)
@pytest.mark.parametrize(("photo", "tolerance"), [(150, 30.0), (40, 6.0)])
def test_the_figures_are_those_of_a_slow_loop_at_the_photo_s_size(
    photo: int, tolerance: float, checkpoint: Path, tmp_path: Path
) -> None:
    """The network takes 64 x 64: the photos are larger than that, and smaller."""
    root = write_shapes(tmp_path / "shapes", train=1, val=13, size=photo)
    rules = f"--rules.tolerances=[0, {tolerance:g}]"
    (result,) = play(root, checkpoint, tmp_path / "game", "--method=gradcam", rules)
    expected = slow_game(root, checkpoint, (0, tolerance))
    assert len(expected) > 2, "the test needs classes that are tested"
    hits = np.concatenate([np.array(pairs) for pairs in expected.values()])
    assert 0 < hits[:, 1].sum() < len(hits), "the test needs hits and misses"
    assert set(result["classes"]) == set(expected)
    for name, pairs in expected.items():
        found = result["classes"][name]
        assert found["tested"] == len(pairs)
        sums = [found["hits"]["0"], found["hits"][f"{tolerance:g}"], found["energy"]]
        assert sums == pytest.approx(np.sum(pairs, axis=0).tolist(), rel=1e-5)
    means = np.mean([np.mean(pairs, axis=0) for pairs in expected.values()], axis=0)
    accuracy = result["accuracy"]
    assert [accuracy["0"], accuracy[f"{tolerance:g}"], result["energy"]] == pytest.approx(
        means, rel=1e-5
    )
    line = (tmp_path / "game" / "table.md").read_text().splitlines()[2].replace(" ", "")
    assert line.startswith(f"|gradcam|{100 * accuracy['0']:.1f}%|")


@pytest.mark.parametrize("way", ["squash", "crop"])
@pytest.mark.parametrize("size", [(300, 200), (50, 90), (64, 64), (30, 400)])
def test_a_map_finds_its_way_back_to_the_photo(way: Any, size: tuple[int, int]) -> None:
    """A bright spot of the photo is seen by the network, and its map put on the photo again."""
    height, width = size
    y, x = height // 2 + height // 9, width // 2 - min(size) // 7
    v, u = np.indices(size)
    spot = 255 * np.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * (min(size) / 12) ** 2))
    picture = Image.fromarray(spot.astype(np.uint8)).convert("RGB")
    preprocess = Preprocess(64, way, (0, 0, 0), (1, 1, 1))
    maps = preprocess.photo_maps(preprocess(picture)[:1], size)
    assert maps.shape == (1, *size)
    found = np.unravel_index(int(maps.argmax()), size)
    pixel = max(1.0, height / 64, width / 64)  # one of the network's
    assert np.abs(np.subtract(found, (y, x))).max() <= pixel
    ones = preprocess.photo_maps(torch.full((1, 64, 64), 0.3), size)
    assert set(ones.unique().tolist()) <= {0.0, torch.tensor(0.3).item()}, "equal values stay equal"
    seen = 1.0 if way == "squash" else (min(size) * 7 / 8) ** 2 / (height * width)
    assert (ones > 0).float().mean() == pytest.approx(seen, rel=0.06)


def test_a_transform_without_a_way_back_is_refused(root: Path, tmp_path: Path) -> None:
    data = CocoMultilabel.from_root(root, "val2017", lambda picture: torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="give it a method photo_maps"):
        pointing_game.play(
            pl.Trainer(logger=False),
            torch.nn.Identity(),
            data,
            GradCAM(),
            "gradcam",
            tmp_path,
            Rules(),
        )


@pytest.mark.wide
def test_several_methods_by_name_and_by_class(
    root: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = "{class_path: lightning_aop.GradCAM, init_args: {target_layer: backbone.features}}"
    results = play(root, checkpoint, tmp_path, f"--method=[gradcam, wgradcam, {theirs}]")
    assert [r["method"] for r in results] == ["gradcam", "wgradcam", "GradCAM"]
    assert results[0]["pairs"] == results[1]["pairs"] > 0
    assert results[0]["accuracy"] == results[2]["accuracy"]
    assert "| wgradcam |" in capsys.readouterr().out
    # Nothing is explained again.
    before = kept(tmp_path)
    assert play(root, checkpoint, tmp_path, "--method=[gradcam, wgradcam]") == results[:2]
    assert kept(tmp_path) == before


def test_methods_by_name_have_the_settings_of_the_paper() -> None:
    method: Any = coco_method("sigcam")
    assert (method.threshold, method.scale) == (0.6, 0.25)
    assert method.perturbation.score.__name__ == "sigmoid"
    for name in METHODS:
        assert hasattr(coco_method(name), "explain")  # type: ignore[arg-type]


def test_what_is_damaged_is_done_again(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    first = play(root, checkpoint, tmp_path, "--method=gradcam", "--rules.group_size=2")
    before = kept(tmp_path)
    paths = sorted(tmp_path.rglob("group-*.pt"))
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    paths[1].write_bytes(b"")
    torch.save({"pairs": []}, paths[2])
    torch.save([1], paths[3])
    again = play(root, checkpoint, tmp_path, "--method=gradcam", "--rules.group_size=2")
    # Finding the layer costs one evaluation for each run of a model.
    changes = {"seconds": 0, "evaluations": 0}
    assert again[0] | changes == first[0] | changes
    after = kept(tmp_path)
    assert len(after) == len(before) == 7
    assert [after[path.stem] for path in paths[4:]] == [before[path.stem] for path in paths[4:]]


@pytest.mark.wide
def test_other_rules_weights_or_data_are_another_run(
    root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for more in ([], ["--rules.score_threshold=0.2"], ["--data.crowds=false"], ["--data.size=48"]):
        play(root, checkpoint, tmp_path, "--method=gradcam", "--rules.limit=2", *more)
    assert len(list(tmp_path.glob("gradcam-*"))) == 4


def test_a_copy_of_the_photos_goes_on_and_other_photos_do_not(
    root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copied, out = tmp_path / "copied", tmp_path / "out"
    shutil.copytree(root, copied, copy_function=shutil.copyfile)
    for folder in (root, copied):
        play(folder, checkpoint, out, "--method=gradcam", "--rules.limit=2")
    assert len(list(out.glob("gradcam-*"))) == 1
    for photo in (copied / "val2017").iterdir():
        photo.write_bytes(photo.read_bytes() + b"\0")
    play(copied, checkpoint, out, "--method=gradcam", "--rules.limit=2")
    assert len(list(out.glob("gradcam-*"))) == 2


def test_nothing_tested_is_said(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    (result,) = play(
        root, checkpoint, tmp_path, "--method=gradcam", "--rules.score_threshold=0.99999999"
    )
    assert result["accuracy"] == {"0": None, "15": None}
    assert "|gradcam|-|-|-|0|0|" in (tmp_path / "table.md").read_text().replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_path=null"], "name a checkpoint: --ckpt_path"),
        (["--ckpt_path=gone.ckpt"], "gone.ckpt: no such file"),
        (["--method=[]"], "no method is named"),
        (["--rules.group_size=0"], "group_size and limit must be at least 1"),
        (["--data.root=nowhere"], "--data.root nowhere: no such folder"),
        (["--data.val=train1999"], "train1999 is no folder"),
    ],
)
def test_what_a_user_can_mend_is_said(
    arguments: Sequence[str],
    message: str,
    root: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status: Any = main(words(root, checkpoint, tmp_path, *arguments))
    except SystemExit as stopped:
        status = stopped.code
    assert status != 0
    assert message in capsys.readouterr().err


def test_bad_rules() -> None:
    with pytest.raises(ValueError, match="score_threshold must lie in"):
        Rules(score_threshold=1.5)
    with pytest.raises(ValueError, match="at least one distance of 0 or more"):
        Rules(tolerances=())


def test_slugs() -> None:
    assert slug("gradcam++") == "gradcam++"
    assert re.fullmatch(r"[\w+-]+", slug("a/../b c"))


def process(root: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "lightning_aop", *words(root, checkpoint, output, *more)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_that_two_processes_finish_gives_the_same_figures(
    root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # I-GOS draws noise, so that figures would differ if groups were put together anew.
    method = "{class_path: lightning_aop.AOP, init_args: {activation: lightning_aop.Blank, "
    method += "perturbation: {class_path: lightning_aop.IGOS, init_args: {iterations: 1}}}}"
    options = [f"--method={method}", "--rules.group_size=2", "--trainer.accelerator=cpu"]
    one = play(root, checkpoint, tmp_path / "one", *options)[0] | {"seconds": 0}
    assert one["pairs"] > 5

    words = process(root, checkpoint, tmp_path / "two", *options)
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as running:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "two").rglob("group-*.pt")):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
    done = kept(tmp_path / "two")
    assert 0 < len(done) < 7

    shared = [*words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    finish(shared, env=ENVIRONMENT)
    groups = kept(tmp_path / "two")
    assert {name: groups[name] for name in done} == done
    assert {entry["process"] for name, entry in groups.items() if name not in done} == {0, 1}
    # One group is missing: fewer than there are processes.
    sorted((tmp_path / "two").rglob("group-*.pt"))[-1].unlink()
    finish(shared, env=ENVIRONMENT)
    assert list(kept(tmp_path / "two")) == [f"group-{number:06d}" for number in range(7)]
    (two,) = json.loads((tmp_path / "two" / "results.json").read_text())
    same = {"seconds": 0, "evaluations": 0}  # each process looks for the layer
    assert_close(two | same, one | same)


def assert_close(first: Any, second: Any) -> None:
    """Compare what JSON holds; a process may round the last digit of a sum in another way."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key])
    elif isinstance(first, list):
        for pair in zip(first, second, strict=True):
            assert_close(*pair)
    else:
        assert first == (pytest.approx(second, abs=1e-6) if isinstance(second, float) else second)


def closure(k: int) -> Any:
    return lambda logits, targets: logits[:, 0] * k


def test_settings_are_told_apart_without_addresses() -> None:
    class Own:
        def __init__(self, value: int) -> None:
            self.value, self.score = value, torch.sigmoid

    first, again, other = (described(Own(v)) for v in (1, 1, 2))
    assert first == again != other
    fast, slow = (described(coco_method(name)) for name in ("fast_sigcam", "sigcam"))
    assert fast != slow
    partials = [described(functools.partial(max, k)) for k in (1, 1, 2)]
    assert partials[0] == partials[1] != partials[2]
    closures = [described(closure(k)) for k in (1, 1, 2)]
    assert closures[0] == closures[1] != closures[2]
    assert "0x" not in first + fast + slow
