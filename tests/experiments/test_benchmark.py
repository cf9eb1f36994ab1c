"""Runs over many pictures: what they find, and that they stop, resume and are shared out."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import SmallNet, finish
from PIL import Image
from torch import Tensor, nn

from lightning_aop import AOP, IGOS, Blank, GradCAM, experiments
from lightning_aop.cli.main import main
from lightning_aop.coco import MultilabelClassifier, Preprocess
from lightning_aop.data.images import read_image
from lightning_aop.experiments.groups import NOTHING, in_groups, unfinished
from lightning_aop.experiments.results import Manifest, parts
from lightning_aop.metrics import DeletionAUC, InsertionAUC
from lightning_aop.scores import Score, sigmoid, softmax
from lightning_aop.types import Images, Maps, Targets

pq = pytest.importorskip("pyarrow.parquet")
HERE = Path(__file__).parents[1]
SIZE, COUNT = 24, 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a bright square, and labels of which some are what the network says."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    rows = ["file,wnid,class_index"]
    for i in range(COUNT):
        pixels = generator.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        pixels[5 + 3 * i : 15 + 3 * i, 8:24] = (250, 30 * i, 120)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,n0,{i % 5}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    torch.manual_seed(3)
    net = SmallNet()
    torch.nn.init.normal_(net.head.weight, std=3)
    torch.save(net.state_dict(), folder / "net.pth")
    igos = {"class_path": "lightning_aop.IGOS", "init_args": {"iterations": 2, "samples": 3}}
    small = {"model": {"class_path": "conftest.SmallNet", "init_args": {"classes": 5}}}
    path = folder / "config.yaml"
    settings: dict[str, Any] = {
        "networks": {
            "small": {**small, "weights": str(folder / "net.pth"), "layer": "features"},
            "untrained": {**small, "mean": [0.5] * 3, "std": [0.5] * 3},
        },
        "methods": {
            "GradCAM": "gradcam",
            "random": "random",
            # I-GOS draws noise.
            "I-GOS": {
                "class_path": "lightning_aop.AOP",
                "init_args": {"activation": "lightning_aop.Blank", "perturbation": igos},
            },
        },
        "data": {"root": str(photos), "size": SIZE},
        "rules": {"steps": 9, "group_size": 2},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    torch.manual_seed(0)
    settings["networks"]["untrained"]["weights"] = str(folder / "other.pth")
    torch.save(SmallNet().state_dict(), folder / "other.pth")
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def run(config: Path, output: Path, *more: str) -> int:
    return main(["benchmark", str(config), f"--output={output}", *more])


def entries(output: Path) -> list[dict[str, Any]]:
    """Return all rows of the last configuration, in order."""
    manifest = Manifest.read(output)
    assert manifest is not None
    rows: list[dict[str, Any]] = []
    for network, folder in manifest.folders.items():
        wanted = set(manifest.methods[network].values())
        for part in parts(output / folder, pq.read_schema(first_part(output / folder)).names):
            found = [row | {"network": network} for row in part.to_pylist()]
            rows += [row for row in found if row["method_digest"] in wanted]
    return rows


def first_part(folder: Path) -> Path:
    return min(folder.glob("part-*.parquet"))


def table(output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Return the table without what the clock says."""
    capsys.readouterr()
    assert main(["table", str(output), "--format=csv", *more]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    return "\n".join(str({k: v for k, v in row.items() if "seconds" not in k}) for row in rows)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run(config, output) == 0
    return output


def test_the_figures_are_those_of_a_loop(config: Path, photos: Path, whole: Path) -> None:
    net = SmallNet().eval()
    net.load_state_dict(torch.load(config.parent / "net.pth"))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    images = []
    for i in range(COUNT):
        with Image.open(photos / f"{i}.png") as picture:
            squashed = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        images.append((torch.from_numpy(squashed).permute(2, 0, 1) / 255 - mean) / std)
    logits = [net(image[None]).detach() for image in images]
    targets = [int(each.argmax()) for each in logits]
    rows = [row for row in entries(whole) if row["network"] == "small"]
    assert len(rows) == 3 * COUNT
    assert {row["correct"] for row in rows} == {True, False}, "the test needs both"
    methods = {"GradCAM": GradCAM("features"), "I-GOS": AOP(Blank(), IGOS(iterations=2, samples=3))}
    for row in rows:
        i = row["image"]
        assert (row["file"], row["group"]) == (f"{i}.png", i // 2)
        assert row["predicted"] == row["target"] == targets[i]
        assert row["correct"] == (targets[i] == row["label"] == i % 5)
        assert row["score"] == pytest.approx(float(logits[i].softmax(1)[0, targets[i]]), abs=1e-5)
        if row["method"] == "random":
            continue
        # With the others of its group: rounding can turn a decision of I-GOS's line search.
        group = [j for j in (i - i % 2, i - i % 2 + 1) if j < COUNT]
        batch = torch.stack([images[j] for j in group])
        classes = torch.tensor([targets[j] for j in group])
        maps = methods[row["method"]].explain(net, batch, classes)[i % 2][None]
        single = (net, images[i][None], maps, torch.tensor([targets[i]]))
        for metric, name in (
            (DeletionAUC(steps=9), "deletion"),
            (InsertionAUC(steps=9), "insertion"),
        ):
            metric.update(*single)
            assert row[name] == pytest.approx(float(metric.compute()), abs=1e-4)
            curve = metric.last_curves[name][0].tolist()
            assert row[f"{name}_curve"] == pytest.approx(curve, abs=1e-4)
        assert row["overall"] == pytest.approx(row["insertion"] - row["deletion"])
        assert row["evaluations"] >= 2
        assert row["seconds"] > 0
        assert row["curve_seconds"] > 0


def command(config: Path, output: Path, *more: str) -> list[str]:
    words = ["benchmark", str(config), f"--output={output}", *more]
    return [sys.executable, "-m", "lightning_aop", *words]


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(config, tmp_path)
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment()) as running:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("part-*.parquet"))) < 2:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("part-*.parquet")}
    assert 2 <= len(kept) < 8, "killed in the middle"
    assert "not finished" in text_of(tmp_path, capsys)
    (next(iter(kept)).parent / "part-000099-0-cafe.parquet").write_bytes(b"half a file")
    assert "going on" in finish(words, env=environment(), timeout=60)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(entries(tmp_path)) == 2 * 3 * COUNT
    assert table(tmp_path, capsys) == table(whole, capsys)


def test_nothing_is_left_to_do(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(whole.rglob("*.parquet"))
    assert run(config, whole) == 0
    assert "to do" not in capsys.readouterr().out
    assert sorted(whole.rglob("*.parquet")) == before


def text_of(output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["table", str(output)]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    text = finish(command(config, tmp_path, *shared), env=environment(), timeout=120)
    assert text.count("overall") == 2  # the heading and the note, once
    assert {path.name.split("-")[2] for path in tmp_path.rglob("part-*")} == {"0", "1"}
    assert len(entries(tmp_path)) == 2 * 3 * COUNT
    assert table(tmp_path, capsys) == table(whole, capsys)


def test_every_process_has_a_group_as_long_as_there_is_one() -> None:
    groups = in_groups(7, 3)
    assert groups == [(0, range(3)), (1, range(3, 6)), (2, range(6, 7))]
    assert unfinished(groups, {1}, 2) == [groups[0], groups[2]]
    assert unfinished(groups, {0, 1}, 3) == [groups[2], (NOTHING, range(0)), (NOTHING, range(0))]
    assert unfinished(groups, {0, 1, 2}, 3) == []


@pytest.mark.wide
def test_only_what_has_changed_starts_anew(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = yaml.safe_load(config.read_text())
    del settings["networks"]["untrained"]
    settings["methods"] = {"GradCAM": "gradcam", "random": "random"}

    def again(**changes: Any) -> str:
        for path, value in changes.items():
            *way, last = path.split("__")
            at = settings
            for key in way:
                at = at[key]
            at[last] = value
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        capsys.readouterr()
        assert run(tmp_path / "config.yaml", tmp_path / "out") == 0
        return capsys.readouterr().out

    again(data__limit=3)
    first = entries(tmp_path / "out")
    assert len(first) == 2 * 3
    assert "new result set" not in again(data__limit=5)  # the second group has grown
    grown = entries(tmp_path / "out")
    assert [row for row in grown if row["image"] < 2] == first[:4]
    assert "5        3" in text_of(tmp_path / "out", capsys) or len(grown) > 10

    def never(*_: object) -> Tensor:
        raise AssertionError("finished results are not computed again")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_aop.methods.cam.GradCAM.weights", never)
        # How much goes through the network at once is no setting of the results.
        again(rules__eval_batch_size=5, methods__edges="edges")
        slow = {"class_path": "lightning_aop.CentreGaussian"}
        assert "the settings of random have changed" in again(methods__random=slow)
    told = again(rules__steps=4)
    assert "small: its settings, weights or images are not those of the earlier run" in told
    assert len(list((tmp_path / "out").glob("small-*"))) == 2
    assert {len(row["deletion_curve"]) for row in entries(tmp_path / "out")} == {5}
    torch.save(SmallNet().state_dict(), tmp_path / "new.pth")
    assert "new result set" in again(networks__small__weights=str(tmp_path / "new.pth"))


class Picky:
    """Fails on some images: an error for the second, NaN for the third."""

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        logits = model(images)
        assert isinstance(logits, Tensor)
        maps = images.mean(dim=1)
        values = [round(float(image[0, 0, 0]), 4) for image in images]
        if Picky.bad[0] in values:
            raise RuntimeError("not this one\nand more words")
        return torch.stack(
            [m * torch.nan if v == Picky.bad[1] else m for m, v in zip(maps, values, strict=True)]
        )

    bad: tuple[float, float]


def test_failures_are_entries_with_a_reason(
    config: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kept = tmp_path / "photos", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    values = []
    for i in range(5):
        with Image.open(photos / f"{i}.png") as picture:
            small = picture.resize((SIZE, SIZE))
        small.save(folder / f"{i}.png")
        small.save(kept / f"{i}.png")
        values.append(round((np.asarray(small)[0, 0, 0] / 255 - 0.485) / 0.229, 4))
    (folder / "4.png").write_bytes(b"no picture")
    net = SmallNet().eval()
    net.load_state_dict(torch.load(config.parent / "net.pth"))
    Picky.bad = (float(values[1]), float(values[2]))
    rows = ["file,label", *(f"{i}.png,{i}" for i in range(4)), "4.png,0", "missing.png,1"]
    (folder / "labels.csv").write_text("\n".join(rows))
    settings = yaml.safe_load(config.read_text())
    del settings["networks"]["untrained"]
    settings["methods"] = {
        "GradCAM": "gradcam",
        "CAM": "cam",
        "picky": {"class_path": "test_benchmark.Picky"},
    }
    settings["data"]["root"] = str(folder)
    settings["rules"]["group_size"] = 3
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert run(own, tmp_path / "out") == 0
    by = {(row["method"], row["image"]): row for row in entries(tmp_path / "out")}
    assert len(by) == 3 * 6
    reasons = {key: row["reason"] for key, row in by.items() if row["reason"]}
    assert reasons["picky", 1] == "RuntimeError: not this one"
    assert reasons["picky", 2].startswith("InvalidValueError: maps hold NaN")
    for method in ("GradCAM", "CAM", "picky"):
        assert "can't be used: it can't be read" in reasons.pop((method, 4))
        assert reasons.pop((method, 5)) == "the image can't be used: the file is missing"
    assert set(reasons) == {("picky", 1), ("picky", 2)}
    assert by["picky", 0]["deletion"] is not None  # of the same group
    assert by["picky", 1]["deletion"] is by["picky", 1]["evaluations"] is None
    text = text_of(tmp_path / "out", capsys)
    assert "small, picky: 1 without values: RuntimeError: not this one" in text
    found = {row["method"]: row for row in csv_rows(tmp_path / "out", capsys)}
    assert (found["GradCAM"]["images"], found["GradCAM"]["failed"]) == ("4", "2")
    assert (found["picky"]["images"], found["picky"]["failed"]) == ("2", "4")
    mean = np.mean([by["picky", i]["overall"] for i in (0, 3)])
    assert float(found["picky"]["overall"]) == pytest.approx(100 * mean, abs=1e-3)

    # Only images that are classified as they are labelled, when they are explained and afterwards.
    right = [i for i in range(4) if by["GradCAM", i]["correct"]]
    assert 0 < len(right) < 4, "the test needs both"
    only = {row["method"]: row for row in csv_rows(tmp_path / "out", capsys, "--images=correct")}
    assert only["GradCAM"]["images"] == only["GradCAM"]["correct"] == str(len(right))
    assert run(own, tmp_path / "correct", "--rules.images=correct") == 0
    also = {row["method"]: row for row in csv_rows(tmp_path / "correct", capsys)}
    assert also["GradCAM"]["overall"] == only["GradCAM"]["overall"]
    assert also["GradCAM"]["failed"] == str(6 - len(right))
    assert "not classified as it is labelled" in text_of(tmp_path / "correct", capsys)

    # Where nothing has values, nothing was achieved.
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"no picture either")
    assert run(own, tmp_path / "nothing") == 1
    for i in range(4):
        (folder / f"{i}.png").write_bytes((kept / f"{i}.png").read_bytes())

    # The labelled class.
    assert run(own, tmp_path / "label", "--rules.target=label") == 0
    rows_of = [row for row in entries(tmp_path / "label") if row["method"] == "GradCAM"]
    assert [row["target"] for row in rows_of] == [0, 1, 2, 3, None, None]


def csv_rows(output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["table", str(output), "--format=csv", *more]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@dataclass(frozen=True)
class Stopped:
    """Is stopped by the user."""

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        raise KeyboardInterrupt


def test_a_stop_is_told_by_the_exit_status(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["methods"] = {"stopped": {"class_path": "test_benchmark.Stopped"}}
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump(settings, sort_keys=False))
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run(own, tmp_path / "out") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # which the trainer lets go


@dataclass(frozen=True)
class Hungry:
    """Has memory for a few images at a time."""

    most: int = 5

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean(dim=1)


def test_running_out_of_memory_is_no_result(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    del settings["networks"]["untrained"]
    hungry = {"class_path": "test_benchmark.Hungry"}
    settings["methods"] = {"hungry": hungry, "edges": "edges"}
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert run(own, tmp_path / "out") == 0
    assert {row["reason"] for row in entries(tmp_path / "out")} == {None}
    settings["methods"]["hungry"] = {**hungry, "init_args": {"most": 0}}
    own.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(torch.OutOfMemoryError):
        run(own, tmp_path / "none")
    assert not list((tmp_path / "none").rglob("part-*"))


def test_a_package_that_is_missing_is_no_result(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    assert run(config, tmp_path, "--methods=[xrai]") == 1
    assert "superpixels need scikit-image: install it" in capsys.readouterr().err
    assert not list(tmp_path.rglob("part-*"))


def test_a_data_set_may_be_a_folder_of_links(config: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "ape").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "data" / "ape" / f"{i}.png").symlink_to(photos / f"{i}.png")
    arguments = [f"--data.root={tmp_path / 'data'}", "--methods=[edges]"]
    assert run(config, tmp_path / "out", *arguments) == 0
    found = entries(tmp_path / "out")
    assert [(row["file"], row["reason"]) for row in found[:2]] == [
        ("ape/0.png", None),
        ("ape/1.png", None),
    ]


class Broken(SmallNet):
    """Gives NaN for dark pictures."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return torch.where(images[:, :1, 0, 0] < 0, torch.nan, logits)


def test_logits_that_are_nan_and_labels_that_are_no_class(
    config: Path, photos: Path, tmp_path: Path
) -> None:
    settings = yaml.safe_load(config.read_text())
    broken = {"model": {"class_path": "test_benchmark.Broken", "init_args": {"classes": 3}}}
    settings["networks"] = {"broken": broken}
    settings["methods"] = {"edges": "edges"}
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump(settings))
    assert run(own, tmp_path / "out", "--rules.target=label") == 1, "no image has values"
    reasons = [row["reason"] for row in entries(tmp_path / "out")]
    nan = "the network's logits are NaN or infinite"
    assert nan in reasons
    assert reasons[3] in (nan, "labelled 3, but the network has classes 0 to 2")
    assert "labelled 4, but the network has classes 0 to 2" in reasons or reasons[4] == nan


def test_it_runs_from_python(config: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    recipe = {"class_path": "conftest.SmallNet"}
    networks = {
        "small": experiments.Network(recipe, str(config.parent / "net.pth"), layer="features")
    }
    data = experiments.Pictures(str(photos), size=SIZE)
    rules = experiments.Rules(steps=9, group_size=2)
    experiments.run(trainer, networks, {"mine": GradCAM()}, data, rules, tmp_path)
    wanted = [r for r in entries(whole) if (r["network"], r["method"]) == ("small", "GradCAM")]
    same = {"seconds": 0, "curve_seconds": 0, "method": "", "method_digest": ""}
    found = entries(tmp_path)
    assert [row | same for row in found] == [row | same for row in wanted]
    assert found[0]["method_digest"] == wanted[0]["method_digest"]


@pytest.mark.parametrize(("chosen", "score"), [(None, sigmoid), ("softmax", softmax)])
def test_a_multilabel_classifier_is_explained_and_judged_by_its_sigmoid(
    chosen: Any, score: Score, photos: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ours = MultilabelClassifier("squeezenet1_1", None, num_classes=3).eval()
    checkpoint: dict[str, Any] = {"state_dict": ours.state_dict()}
    ours.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    network = experiments.Network("squeezenet1_1", str(tmp_path / "last.ckpt"), score=chosen)
    data = experiments.Pictures(str(photos), limit=1, size=64)
    stages = Blank(), IGOS(iterations=2, samples=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    arguments = {"net": network}, {"I-GOS": AOP(*stages)}, data, experiments.Rules(steps=9)
    experiments.run(trainer, *arguments, tmp_path / "run")
    [row] = entries(tmp_path / "run")
    image = Preprocess(64, "squash")(read_image(photos / "0.png"))[None]
    logits = ours(image).detach()
    target = logits.argmax(dim=1)
    assert row["score"] == pytest.approx(float(score(logits, target)), abs=1e-5)
    method = AOP(Blank(), IGOS(iterations=2, samples=3, score=score))
    metric = InsertionAUC(score=score, steps=9)
    metric.update(ours, image, method.explain(ours, image, target), target)
    assert row["insertion"] == pytest.approx(float(metric.compute()), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root=nowhere"], "data.root nowhere: no such folder"),
        (["--methods={}"], "name networks and methods"),
        (["--networks.small.model=resnet999"], "is no classifier of torchvision"),
        (["--networks.small.weights=nowhere.pth"], "nowhere.pth: no such file"),
        (["--rules.group_size=0"], "rules.group_size must be at least 1, got 0"),
        (["--data.limit=0"], "data.limit must be at least 1, got 0"),
        (["--methods=[gradcamm]"], "gradcamm"),
    ],
)
def test_what_a_user_can_mend_is_said(
    arguments: list[str],
    message: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status: Any = run(config, tmp_path / "out", *arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status != 0
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path)]) == 1
    assert "holds no run.json: name the output folder" in capsys.readouterr().err


def test_without_pyarrow(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(config, tmp_path) == 1
    assert 'need pyarrow: pip install "lightning-aop[benchmark]"' in capsys.readouterr().err
