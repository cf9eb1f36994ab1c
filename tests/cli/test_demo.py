import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pycocotools")
from lightning_aop.cli.demo import run


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


def test_a_missing_package_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"pip install .*\[coco\]"):
        run(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_heat_moves_onto_the_objects(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.before["explain/energy_in_mask"] < 2 * result.object_area
    assert result.after["explain/energy_in_mask"] > 5 * result.object_area
    assert result.after["explain/pointing_game"] > 0.6
    assert result.after["explain/overall_auc"] > 0.4
