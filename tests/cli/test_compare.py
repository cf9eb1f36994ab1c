import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torchvision
from PIL import Image

from lightning_aop import GradCAM
from lightning_aop.cli.compare import chosen_methods
from lightning_aop.cli.main import main
from lightning_aop.methods.names import FIGURE_5, METHODS
from lightning_aop.metrics import DeletionAUC, InsertionAUC

SOME = ["gradcam", "layercam", "gradient", "random"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.jpg")
    return sorted(folder.iterdir())


def compare(weights: Path, out: Path, photos: list[Path], *arguments: str) -> int:
    common = ["--model=squeezenet1_1", f"--weights={weights}", "--size=96", f"-o={out}"]
    words = [*map(str, photos), *common, "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    return main(["compare", *words, *arguments])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_layer_that_is_not_there_is_said_once(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--methods", *SOME, "--target-layer=features.99")
    assert compare(weights, tmp_path, photos, *words) == 1
    said = capsys.readouterr().err
    assert said.count("SqueezeNet has no layer 'features.99'") == 1
    assert not (tmp_path / "results.csv").exists()


def test_a_picture_and_a_table(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(weights, tmp_path, photos, "--methods", *SOME, "--cell=64") == 0
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 5 * 64
        assert picture.height > 2 * 64
        assert np.asarray(picture).std() > 10
    rows = rows_of(tmp_path)
    assert [(r["photo"], r["method"]) for r in rows] == [
        (photo.name, method) for method in SOME for photo in photos
    ]
    # The figures are those of torchmetrics on the maps that the method gives.
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    model.load_state_dict(torch.load(weights))
    with Image.open(photos[0]) as opened:
        short = torchvision.transforms.v2.functional.resize(opened.convert("RGB"), 110)
    picture = torchvision.transforms.v2.functional.center_crop(short, 96)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    target = model(image).argmax(dim=1)
    maps = GradCAM().explain(model, image, target)
    for metric, name in (
        (DeletionAUC(steps=28), "deletion"),
        (InsertionAUC(steps=28), "insertion"),
    ):
        metric.update(model, image, maps, target)
        assert float(rows[0][name]) == pytest.approx(float(metric.compute()), abs=1e-4)
    assert float(rows[0]["overall"]) == pytest.approx(
        float(rows[0]["insertion"]) - float(rows[0]["deletion"]), abs=1e-6
    )
    cost = {r["method"]: float(r["evaluations"]) for r in rows}
    assert cost["gradcam"] == cost["gradient"] == 2
    assert cost["random"] == 0
    assert re.search(r"layercam +\d\.\d{3} +\d\.\d{3} +-?\d\.\d{3}", capsys.readouterr().out)


@pytest.mark.wide
def test_it_goes_on_where_it_was(
    weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(self: object, *_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_aop.methods.cam.LayerCAM.weights", stopped)
        assert compare(weights, tmp_path, photos, "--methods", *SOME) == 130
    assert "stopped" in capsys.readouterr().err
    first = rows_of(tmp_path)
    assert {r["method"] for r in first} == {"gradcam"}
    with monkeypatch.context() as patch:
        patch.setattr("lightning_aop.methods.cam.GradCAM.weights", stopped)  # not asked again
        assert compare(weights, tmp_path, photos, "--methods", *SOME) == 0
    assert rows_of(tmp_path)[:2] == first
    assert len(rows_of(tmp_path)) == 8
    # A method that has come to mean something else is asked again.
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "gradient", METHODS["integrated_gradients"])
        assert compare(weights, tmp_path, photos, "--methods", *SOME) == 0
    cost = {r["method"]: float(r["evaluations"]) for r in rows_of(tmp_path)}
    assert cost["gradient"] == 100
    # Other weights are another network.
    other = tmp_path / "other.pth"
    state = torch.load(weights)
    torch.save({k: v * 1.1 for k, v in state.items()}, other)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_aop.methods.cam.GradCAM.weights", stopped)
        assert compare(other, tmp_path, photos, "--methods", "gradcam") == 130


@pytest.mark.wide
def test_what_fails_is_named_and_the_rest_is_shown(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    out = tmp_path / "out"
    assert compare(weights, out, [broken, *photos], "--methods", "cam", "gradcam") == 1
    errors = capsys.readouterr().err
    assert "broken.jpg: it can't be read" in errors
    assert "cam: CAM needs global average pooling and one linear layer" in errors
    assert {r["method"] for r in rows_of(out)} == {"gradcam"}
    assert (out / "comparison.png").exists()
    assert compare(weights, tmp_path / "none", [broken], "--methods", "gradcam") == 1
    assert not (tmp_path / "none" / "comparison.png").exists()
    # A file where the folder should be, and a damaged map.
    assert compare(weights, broken, photos, "--methods", "gradcam") == 1
    assert (
        "no folder can be made there (it is a file: name another folder)" in capsys.readouterr().err
    )
    for kept in (out / "maps").iterdir():
        kept.write_bytes(b"junk")
    assert compare(weights, out, photos, "--methods", "gradcam") == 0


def test_methods_without_their_package_are_named(
    weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    assert compare(weights, tmp_path, photos, "--methods", "gradient", "xrai", "gradcam") == 1
    errors = capsys.readouterr().err
    assert 'gradient: captum is not installed: install it with pip install "lightning' in errors
    assert 'xrai: superpixels need scikit-image: install it with pip install "lightning' in errors
    assert {r["method"] for r in rows_of(tmp_path)} == {"gradcam"}


def test_methods_by_name_by_figure_and_all() -> None:
    assert chosen_methods(["gradcam", "figure5", "gradcam"]) == [
        "gradcam",
        *(n for n in FIGURE_5 if n != "gradcam"),
    ]
    assert chosen_methods(["all"]) == list(METHODS)


def test_an_unknown_method_is_refused(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(weights, tmp_path, photos, "--methods", "gradcamm") == 1
    told = capsys.readouterr().err
    assert "--methods gradcamm: there is no such method; did you mean gradcam or" in told
    assert compare(weights, tmp_path, photos, "--cell=10") == 1
    assert "--cell 10: must be 32 or more" in capsys.readouterr().err
