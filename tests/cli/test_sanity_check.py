import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import skimage
import torch
import torchvision
from PIL import Image

from lightning_aop import GradCAM
from lightning_aop.cli.main import main
from lightning_aop.metrics.randomization import parameter_randomization


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "cat.jpg"
    Image.fromarray(skimage.data.chelsea()).save(path)
    return path


def check(photo: Path, weights: Path, out: Path, *more: str) -> int:
    common = ["--model=squeezenet1_1", f"--weights={weights}", "--size=64", f"-o={out}"]
    return main(["sanity-check", str(photo), *common, *more])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


LAYERS = ["--layers", "classifier.1", "features.12.expand3x3", "features.0"]


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_the_figures_are_those_of_the_function(
    mode: Any, photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--mean",
        "0",
        "0",
        "0",
        "--std",
        "1",
        "1",
        "1",
        "--seed",
        "3",
        "--target-class",
        "7",
        "9",
    ]
    assert check(photo, weights, tmp_path, *LAYERS, *more, f"--mode={mode}") == 0
    rows = rows_of(tmp_path)
    assert [r["layer"] for r in rows] == [layer for layer in LAYERS[1:] for _ in range(2)]
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    model.load_state_dict(torch.load(weights))
    functional = torchvision.transforms.v2.functional
    with Image.open(photo) as opened:
        picture = functional.resize(functional.to_image(opened.convert("RGB")), [73])
    # Dividing by 255 instead rounds otherwise, and how much of that reaches the SSIM depends on the CPU.
    picture = functional.to_dtype(functional.center_crop(picture, [64]), torch.float32, scale=True)
    image = picture.as_subclass(torch.Tensor)
    images, targets = image[None].repeat(2, 1, 1, 1), torch.tensor([7, 9])
    steps = parameter_randomization(
        model, images, targets, GradCAM(), mode=mode, layers=LAYERS[1:], seed=3
    )
    for number, step in enumerate(steps):
        for i in range(2):
            row = rows[2 * number + i]
            assert float(row["rank_correlation"]) == pytest.approx(
                float(step.rank_correlation[i]), abs=1e-4
            )
            assert float(row["ssim"]) == pytest.approx(float(step.ssim[i]), abs=1e-6)
    with Image.open(tmp_path / "sanity_check.png") as drawn:
        assert drawn.width > 5 * 112
    printed = capsys.readouterr().out
    assert "features.12.expand3x3" in printed
    assert "rank correlation" in printed


def test_a_map_that_ignores_the_network_stays_what_it_was(
    photo: Path, weights: Path, tmp_path: Path
) -> None:
    assert check(photo, weights, tmp_path, *LAYERS, "--method=edges") == 0
    assert {float(r["rank_correlation"]) for r in rows_of(tmp_path)} == {1.0}
    assert all(float(r["ssim"]) == pytest.approx(1) for r in rows_of(tmp_path))


@pytest.mark.wide
def test_it_goes_on_where_it_was(
    photo: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert check(photo, weights, whole, *LAYERS) == 0
    calls = []
    original = GradCAM.weights

    def counted(self: GradCAM, activations: Any, gradients: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, activations, gradients)

    monkeypatch.setattr(GradCAM, "weights", counted)
    out = tmp_path / "stopped"
    assert check(photo, weights, out, *LAYERS) == 130
    assert [r["layer"] for r in rows_of(out)] == ["classifier.1"]
    assert check(photo, weights, out, *LAYERS) == 0
    assert len(calls) == 3 + 3  # the map as trained, and the two layers that were missing
    assert rows_of(out) == rows_of(whole)
    assert check(photo, weights, out, *LAYERS) == 0
    assert len(calls) == 6


def test_what_a_user_can_fix_is_said(
    photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(photo, weights, tmp_path, "--layers", "features.1") == 1
    error = capsys.readouterr().err
    assert (
        "--layers features.1: squeezenet1_1 has no such layer with weights; it has classif" in error
    )
    assert check(photo, weights, tmp_path, "--cell=3") == 1
    assert "--cell 3: must be 32 pixels or more" in capsys.readouterr().err
    assert check(tmp_path / "none.jpg", weights, tmp_path) == 1
    assert "none.jpg: the file is missing" in capsys.readouterr().err


def test_it_ends_in_a_verdict(
    photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, word in (("edges", "fails"), ("random", "fails")):
        assert check(photo, weights, tmp_path / method, *LAYERS, f"--method={method}") == 0
        printed = capsys.readouterr().out
        assert f"\n{method} {word}: " in printed
        assert "threshold 0.5, ours: Adebayo" in printed
    words = [*LAYERS[:2], "--method=gradcam", "--mode=independent", "--json"]
    assert check(photo, weights, tmp_path / "json", *words) == 0
    layer, verdict = map(json.loads, capsys.readouterr().out.splitlines())
    assert layer["layer"] == "classifier.1"
    assert verdict["threshold"] == 0.5
    assert verdict["passes"] == (abs(layer["rank_correlation"]) < 0.5)


def test_blank_maps_are_told_from_maps_that_changed(
    photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # By random weights in its last block the network gives the same for every image.
    assert check(photo, weights, tmp_path, *LAYERS, "--method=gradcam") == 0
    printed = capsys.readouterr().out
    blank = {row["layer"]: row["blank"] == "True" for row in rows_of(tmp_path)}
    assert blank == {"classifier.1": False, "features.12.expand3x3": True, "features.0": True}
    for layer, told in blank.items():
        assert re.search(rf"{layer} .* {int(told)} of 1\n", printed)
    assert "A blank map says nothing" in printed
