"""The mean curves of a run (Figure 4), and the configurations that come with the package."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_aop.cli.benchmark import _instantiated, benchmark_parser
from lightning_aop.cli.compare import chosen_methods
from lightning_aop.cli.configs import config_folder, resolved, shipped_configs
from lightning_aop.cli.main import main
from lightning_aop.cli.options import compare_parser
from lightning_aop.cli.output import write_figure
from lightning_aop.errors import UserError
from lightning_aop.experiments.curves import draw, mean_curves
from lightning_aop.experiments.results import Manifest, write_part
from lightning_aop.methods.names import FIGURE_5, METHODS

pytest.importorskip("pyarrow")


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write 11 images in groups of 4, of which the fourth has failed and the first is there twice."""
    methods = {"A": "a", "B": "b"}
    Manifest("0", 11, "all", None, {"net": "net-0"}, {"net": methods}, {}).write(tmp_path)
    generator = np.random.default_rng(0)
    curves = {name: generator.random((11, 2, 6), dtype=np.float32) for name in methods}
    for group, images in enumerate((range(4), range(4, 8), range(8, 12), range(1))):
        rows: list[dict[str, Any]] = []
        for name, digest in methods.items():
            for image in images:
                # One beyond the number that is asked for, as of a run with a higher limit.
                falling, rising = curves[name][image % 11]
                row: dict[str, Any] = {"group": group, "image": image, "method_digest": digest}
                row |= {"correct": image % 2 == 0, "method": name}
                if image == 3:
                    row["reason"] = "none"
                else:
                    row |= {"deletion_curve": falling.tolist(), "insertion_curve": rising.tolist()}
                rows.append(row)
        write_part(tmp_path / "net-0", group, 0, rows)
    return tmp_path, curves


def test_means_and_bands_are_those_of_all_curves_at_once(
    finished: tuple[Path, dict[str, np.ndarray]],
) -> None:
    run, curves = finished
    for images, rows in (
        ("all", [i for i in range(11) if i != 3]),
        ("correct", [0, 2, 4, 6, 8, 10]),
    ):
        found = mean_curves(run, images)  # type: ignore[arg-type]
        assert len(found) == 4
        for name, values in curves.items():
            for g, game in enumerate(("deletion", "insertion")):
                curve, own = found["net", name, game], values[rows, g].astype(np.float64)
                assert curve.count == len(rows)
                np.testing.assert_allclose(curve.mean, own.mean(axis=0))
                error = own.std(axis=0, ddof=1) / len(rows) ** 0.5
                np.testing.assert_allclose(curve.half_band, 1.96 * error)


def test_the_picture(
    finished: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    assert main(["curves", str(run)]) == 0
    with Image.open(run / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    figure = draw(mean_curves(run), ["net"], ["A", "B"], "B")
    falling, rising = figure.axes
    assert [line.get_label().split()[0] for line in falling.get_lines()] == ["A", "B"]
    curve = mean_curves(run)["net", "B", "insertion"]
    np.testing.assert_allclose(rising.get_lines()[1].get_ydata(), curve.mean)
    np.testing.assert_allclose(rising.get_lines()[1].get_xdata(), np.linspace(0, 100, 6))
    area = np.interp(np.linspace(0, 5, 501), range(6), curve.mean).mean()
    assert float(rising.get_lines()[1].get_label().split()[1]) == pytest.approx(100 * area, abs=0.2)
    assert main(["curves", str(run), "-o", str(run / "new" / "curves.pdf")]) == 0
    assert (run / "new" / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert main(["curves", str(run), "-o", str(run / "curves.txt")]) == 1
    assert "must end in .png, .pdf or .svg" in capsys.readouterr().err


def test_dollars_in_names_are_drawn(finished: tuple[Path, dict[str, np.ndarray]]) -> None:
    run, _ = finished
    found = {("$x_$", "$10_$", game): curve for (_, _, game), curve in mean_curves(run).items()}
    write_figure(draw(found, ["$x_$"], ["$10_$"], "$10_$"), run / "names.svg")
    drawn = (run / "names.svg").read_text()
    assert ">$x_$<" in drawn
    assert ">$10_$  " in drawn


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", str(tmp_path)]) == 1
    assert "holds no run.json" in capsys.readouterr().err
    folders: dict[str, Any] = {"net": "net-0"}
    Manifest("0", 1, "all", None, folders, {"net": {"A": "a"}}, {}).write(tmp_path)
    assert main(["curves", str(tmp_path)]) == 1
    assert "there are no curves yet" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table1", "table2", "figure4", "photos_table1", "photos_table2"])
def test_the_configurations_are_the_paper_s(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_AOP_DATA", str(tmp_path))
    (tmp_path / "photos").mkdir()
    assert resolved(name, "benchmark") == resolved(f"configs/benchmark/{name}.yaml", "benchmark")
    words = ["--config", resolved(name, "benchmark")]
    if "photos" not in name:
        words += ["--data.root", str(tmp_path)]
    options = _instantiated(benchmark_parser(), [*words, "--trainer.accelerator=cpu"])
    one = ["gradcam", "wgradcam", "emp", "igos", "gradcam+emp", "gradcam+igos", "sigcam"]
    two = ["gradcam", "gradcam++", "igos", "xrai", "sigcam"]
    assert list(options.methods.values()) == (one if name.endswith("table1") else two)
    assert (options.data.size, options.data.resize) == (224, "squash")
    assert options.rules.pixels_per_step == (896 if "photos" in name else 448)
    layers = {"densenet201": "features.norm5", "inception_v3": "Mixed_7c", "vgg19": "features.36"}
    for network, settings in options.networks.items():
        assert settings.layer == layers.get(network, settings.layer) is not None
    limit, paper = {"table1": (5000, "table1"), "figure4": (5000, "table2")}.get(
        name, (None, "table2" if name == "table2" else None)
    )
    assert (options.data.limit, options.paper) == (limit, paper)


def test_every_method_but_the_ceiling_is_run_on_the_photos_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_AOP_DATA", str(tmp_path))
    (tmp_path / "photos").mkdir()
    every, one = (
        _instantiated(benchmark_parser(), ["--config", resolved(name, "benchmark")])
        for name in ("photos_methods", "photos_table1")
    )
    assert set(every.methods.values()) == set(METHODS) - {"greedy_ranking", "fast_xrai"}
    assert (every.output, every.rules, every.data) == (one.output, one.rules, one.data)
    assert every.networks.items() <= one.networks.items()
    # What several of them run has one name, and so is computed once.
    assert one.methods.items() <= every.methods.items()


def test_the_galleries_and_the_pointing_game_have_configurations() -> None:
    def gallery(name: str) -> Any:
        return compare_parser().parse_args(["--config", resolved(name, "benchmark"), "a.jpg"])

    three, five = gallery("figure3"), gallery("figure5")
    assert chosen_methods(three.methods) == ["gradcam", "wgradcam", "gradcam++"]
    assert chosen_methods(five.methods) == list(FIGURE_5)
    for options in (three, five):
        assert (options.model, options.target_layer) == ("densenet201", "features.norm5")
        assert options.fit == "squash"
    table3 = yaml.safe_load(Path(resolved("table3", "benchmark")).read_text())
    assert table3["method"] == ["gradcam", "gradcam++", "igos", "xrai", "sigcam"]
    with pytest.raises(SystemExit) as stopped:
        main(["pointing-game", "--config", "table3", "--print_config"])
    assert stopped.value.code == 0


def test_all_configurations_are_known_by_name() -> None:
    for path in config_folder().rglob("*.yaml"):
        assert resolved(path.stem, "benchmark") == str(path)
    assert len(shipped_configs("benchmark")) >= 8
    assert "coco_resnet50" in shipped_configs()
    with pytest.raises(UserError, match=r"--config tabel1: no such file.*did you mean .*table1"):
        resolved("tabel1", "benchmark")
