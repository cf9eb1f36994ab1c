import os
import sys
from pathlib import Path

import pytest
from conftest import finish
from PIL import Image

pytest.importorskip("pycocotools")
from lightning_aop.demo import run

EXAMPLE = Path(__file__).parents[1] / "examples" / "watch_finetuning.py"


def test_a_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, epochs=2, pictures=240)
    assert result.after["val/mAP"] > result.before["val/mAP"]
    grids = sorted(result.grids.glob("*.png"))
    assert len(grids) == 3
    with Image.open(grids[-1]) as picture:
        assert picture.width > 800
    printed = capsys.readouterr().out
    assert "before   after" in printed
    assert str(result.grids) in printed
    (page,) = tmp_path.rglob("report.html")
    assert str(page) in printed
    assert "--logdir" in printed


@pytest.mark.slow
def test_the_heat_moves_onto_the_objects(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.before["explain/energy_in_mask"] < 2 * result.object_area
    assert result.after["explain/energy_in_mask"] > 5 * result.object_area
    assert result.after["explain/pointing_game"] > 0.6
    assert result.after["explain/overall_auc"] > 0.4


def test_the_watching_example_learns_and_is_watched(tmp_path: Path) -> None:
    import torch
    import torchvision

    from lightning_aop.coco.shapes import write_shapes

    root = write_shapes(tmp_path / "shapes", train=8, val=4, size=64)
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), weights)
    output = tmp_path / "watch"
    command = [sys.executable, EXAMPLE, "--data", root, "--backbone", "mobilenet_v3_small"]
    command += ["--weights", weights, "--output", output, "--epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finish(command, env=environment)
    assert len(list(output.rglob("heatmaps/step-*.png"))) == 2
