"""The scripts that write the docs' measured tables, on the files of a small run of the real engine."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SmallNet
from PIL import Image

from lightning_aop.cli.main import main
from lightning_aop.coco import CocoMultilabel
from lightning_aop.data.shapes import write_shapes
from lightning_aop.experiments.paper import (
    reported,
    reported_difference,
    reported_overall,
    reported_pointing,
)
from lightning_aop.experiments.pointing_game import ClassResult, Result, details
from lightning_aop.experiments.results import Manifest, parts
from lightning_aop.experiments.tables import Interval, load

pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[2]
COUNT = 9
PHOTOS = {"first": 9, "second": 6}  # of the networks
AOP = "lightning_aop.AOP"


def script(name: str = "reproduction") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def refined(activation: str, perturbation: str) -> dict[str, Any]:
    second = {"iterations": 2, "samples": 2} if perturbation == "IGOS" else {"iterations": 3}
    stages = {
        "activation": f"lightning_aop.{activation}",
        "perturbation": {"class_path": f"lightning_aop.{perturbation}", "init_args": second},
    }
    return {"class_path": AOP, "init_args": stages}


TABLE_1 = {
    "GradCAM": "gradcam",
    "WGradCAM": "wgradcam",
    "EMP": refined("Blank", "EMP"),
    "I-GOS": refined("Blank", "IGOS"),
    "GradCAM + I-GOS": refined("GradCAM", "IGOS"),
    "SIGCAM": refined("WGradCAM", "IGOS"),
}
TABLE_2 = {
    "GradCAM": "gradcam",
    "GradCAM++": "gradcam++",
    "I-GOS": refined("Blank", "IGOS"),
    "XRAI": {"class_path": "lightning_aop.XRAI", "init_args": {"steps": 2, "segments": [5]}},
    "SIGCAM": refined("WGradCAM", "IGOS"),
    "fast_sigcam()": {"class_path": "lightning_aop.fast_sigcam", "init_args": {"iterations": 2}},
}
FURTHER = {
    "random": "random",
    "GreedyRanking": {"class_path": "lightning_aop.GreedyRanking", "init_args": {"cells": 2}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tables in one folder, the first on fewer photos; of one network there are fewer still."""
    folder = tmp_path_factory.mktemp("reproduction")
    generator = np.random.default_rng(0)
    lines = ["file,wnid,class_index"]
    for i in range(COUNT):
        pixels = generator.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        pixels[3 * i : 3 * i + 10, 8:24] = (250, 25 * i, 120)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,n0,{i % 5}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    networks = {}
    for seed, name in enumerate(PHOTOS):
        torch.manual_seed(seed)
        net = SmallNet()
        torch.nn.init.normal_(net.head.weight, std=3)
        torch.save(net.state_dict(), folder / f"{name}.pth")
        model = {"class_path": "conftest.SmallNet", "init_args": {"classes": 5}}
        networks[name] = {"model": model, "weights": str(folder / f"{name}.pth")}
        networks[name]["layer"] = "features"
    settings: dict[str, Any] = {
        "output": str(folder / "run"),
        "data": {"root": str(folder), "size": 24},
        "rules": {"steps": 6, "group_size": 3},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    every = {"1": TABLE_1, "2": {**TABLE_2, **FURTHER}}
    for name, limit in PHOTOS.items():
        for table, methods in every.items():
            # All networks are named, so that the last configuration knows them.
            last = (name, table) == ("second", "2")
            chosen = networks if last else {name: networks[name]}
            path = folder / f"{name}-{table}.yaml"
            path.write_text(
                yaml.safe_dump(
                    {**settings, "networks": chosen, "methods": methods}, sort_keys=False
                )
            )
            photos = limit - 3 * (table == "1")
            assert main(["benchmark", str(path), f"--data.limit={photos}"]) == 0
    return folder / "run"


def values(run: Path, network: str) -> dict[str, dict[int, dict[str, float]]]:
    """What the files hold, by method and image."""
    manifest = Manifest.read(run)
    assert manifest is not None
    found: dict[str, dict[int, dict[str, float]]] = {}
    columns = ("method", "image", "deletion", "insertion", "overall", "evaluations", "reason")
    for part in parts(run / manifest.folders[network], columns):
        for row in part.to_pylist():
            assert row["reason"] is None
            found.setdefault(row["method"], {})[row["image"]] = row
    return found


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def number(cell: str) -> float:
    return float(cell.replace("\N{MINUS SIGN}", "-").split(" ")[0])


def bounds(cell: str) -> tuple[float, float]:
    low, high = re.findall(r"[+-]?[\d.]+", cell.replace("\N{MINUS SIGN}", "-"))[1:]
    return float(low), float(high)


def test_results_of_earlier_configurations_are_there_when_asked_for(run: Path) -> None:
    _, last = load(run)
    assert {column.method for column in last} == {*TABLE_2, *FURTHER}
    _, every = load(run, everything=True)
    assert {column.method for column in every} == {*TABLE_1, *TABLE_2, *FURTHER}
    seen = {(c.network, c.method): int(c.seen.sum()) for c in every}
    assert seen["first", "EMP"] == 6
    assert seen["first", "GradCAM++"] == 9
    assert seen["second", "EMP"] == 3


def test_each_table_is_over_the_photos_that_its_methods_share(run: Path) -> None:
    text = script().faithfulness(script().Run.of(run))
    assert "Table 1, photos: first 6, second 3:" in text
    assert "Table 2, photos: first 9, second 6:" in text
    assert "Not measured yet: gradcam+emp." in text
    held = {network: values(run, network) for network in PHOTOS}
    tables = text.split("Table 2, ")
    for table, methods, photos in (
        (tables[0], TABLE_1, {"first": 6, "second": 3}),
        (tables[1].split("The paper's orders")[0], TABLE_2, {"first": 9, "second": 6}),
    ):
        header, _, *rows = cells(table)
        assert header[1:4] == ["first: del.", "ins.", "overall"]
        assert [row[0] for row in rows] == list(methods)
        for row in rows:
            overall, apart = [], []
            for start, (network, n) in zip((1, 4), photos.items(), strict=True):
                own = [held[network][row[0]][image] for image in range(n)]
                for place, measure in enumerate(("deletion", "insertion", "overall")):
                    mean = 100 * np.mean([value[measure] for value in own])
                    assert number(row[start + place]) == pytest.approx(mean, abs=0.0501)
                overall.append(mean)
                reference = [held[network]["SIGCAM"][image]["overall"] for image in range(n)]
                apart.append(100 * np.mean(reference) - mean)
            assert number(row[7]) == pytest.approx(np.mean(overall), abs=0.0501)
            low, high = bounds(row[7])
            assert low < number(row[7]) < high
            if row[0] == "SIGCAM":
                assert row[8] == ""
            else:
                assert number(row[8]) == pytest.approx(np.mean(apart), abs=0.0501)
        assert number(rows[0][9]) == 2


def test_methods_that_are_ahead_of_their_tables_have_one_of_their_own(run: Path) -> None:
    module = script()
    found = module.Run.of(run)
    assert "have the most" not in module.faithfulness(found)  # Table 2 is over all photos
    columns = dict(found.columns)
    for network, n in {"first": 2, "second": 1}.items():
        slow = columns[network, "xrai"]
        cut = {name: np.where(np.arange(len(v)) < n, v, np.nan) for name, v in slow.figures.items()}
        columns[network, "xrai"] = replace(slow, figures=cut)
    text = module.faithfulness(replace(found, columns=columns))
    assert "Table 2, photos: first 2, second 1:" in text
    _, own = text.split("The methods that have the most, ")
    assert own.startswith("photos: first 9, second 6:")
    rows = cells(own.split("The paper's orders")[0])[2:]
    assert [row[0] for row in rows] == ["GradCAM", "I-GOS", "SIGCAM", "GradCAM++", "fast_sigcam()"]
    held = {network: values(run, network) for network in PHOTOS}
    for row in rows:
        overall = [
            np.mean([held[network][row[0]][image]["overall"] for image in range(n)])
            for network, n in PHOTOS.items()
        ]
        assert number(row[7]) == pytest.approx(100 * np.mean(overall), abs=0.0501)


def test_every_method_is_in_one_table_the_best_first(run: Path) -> None:
    text = script().faithfulness(script().Run.of(run)).split("Every method, ")[1]
    assert text.startswith("photos: first 6, second 3:")
    held = {network: values(run, network) for network in PHOTOS}
    means = {
        method: np.mean(
            [
                np.mean([held[network][method][image]["overall"] for image in range(n)])
                for network, n in {"first": 6, "second": 3}.items()
            ]
        )
        for method in {**TABLE_1, **TABLE_2, **FURTHER}
    }
    rows = cells(text)[2:]
    assert [row[0] for row in rows] == sorted(means, key=lambda method: -means[method])
    for row in rows:
        assert number(row[7]) == pytest.approx(100 * means[row[0]], abs=0.0501)


def test_what_has_no_values_is_told_apart_from_what_was_not_measured(run: Path) -> None:
    module = script()
    found = module.Run.of(run)
    columns = dict(found.columns)
    for network in PHOTOS:
        own = columns[network, "random"]
        nothing = {name: np.full_like(values, np.nan) for name, values in own.figures.items()}
        columns[network, "random"] = replace(own, figures=nothing)
    told = module.faithfulness(replace(found, columns=columns))
    assert "Without values, as the run says why: random." in told.split("Every method, ")[1]
    assert "Not measured yet" not in told.split("Every method, ")[1]
    assert "Without values" not in module.faithfulness(found)


def test_the_orders_are_the_papers_and_their_verdicts_those_of_the_intervals(run: Path) -> None:
    text = script().faithfulness(script().Run.of(run)).split("The paper's orders")[1]
    rows = cells(text.split("Every method")[0])[2:]
    held = {network: values(run, network) for network in PHOTOS}
    assert not any("+ EMP" in row[0] for row in rows)
    verdicts = [row[5] for row in rows]
    assert f"Of {len(rows)} orders: *holds*: {verdicts.count('holds')}, " in text
    assert f"*does not hold*: {verdicts.count('does not hold')}." in text
    for order, measure, paper, here, photos, found in rows:
        one, other = order.split(" before ")
        sign = -1 if measure == "deletion" else 1
        apart = []
        for network in PHOTOS:
            own = held[network]
            both = sorted(set(own[one]) & set(own[other]))
            difference = [own[one][i][measure] - own[other][i][measure] for i in both]
            apart.append(100 * sign * np.mean(difference))
        assert number(here) == pytest.approx(np.mean(apart), abs=0.0501)
        low, high = bounds(here)
        if min(abs(low), abs(high)) > 0.05:
            expected = "holds" if low > 0 else "does not hold" if high < 0 else "level"
            assert found == expected
        assert number(paper) > 0
        only_first = {one, other} & {"WGradCAM", "EMP", "GradCAM + I-GOS"}
        assert photos == ("3 to 6" if only_first else "6 to 9")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 2, "holds"), (-1, 2, "level"), (0, 2, "level"), (-3, -0.1, "does not hold")],
)
def test_a_verdict_is_that_of_an_interval(low: float, high: float, words: str) -> None:
    assert script().verdict(Interval((low + high) / 2, low, high)) == words


def test_an_interval_is_that_of_a_loop_over_resamples(run: Path) -> None:
    module = script()
    found = module.Run.of(run)
    photos = found.shared(["sigcam", "gradcam"])
    told = found.mean(photos, found.difference("overall", "sigcam", "gradcam"))
    held = {network: values(run, network) for network in PHOTOS}
    apart = {
        network: {
            image: held[network]["SIGCAM"][image]["overall"] - row["overall"]
            for image, row in held[network]["GradCAM"].items()
        }
        for network in PHOTOS
    }
    generator, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = generator.integers(COUNT, size=COUNT).tolist()
        own = [[d[i] for i in drawn if i in d] for d in apart.values()]
        if all(own):
            means.append(100 * np.mean([np.mean(each) for each in own]))
    low, high = np.quantile(means, (0.025, 0.975))
    assert (told.low, told.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_page_is_rewritten_between_its_markers_only(run: Path, tmp_path: Path) -> None:
    module, page = script(), tmp_path / "reproduction.md"
    given = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    page.write_text(given, encoding="utf-8")
    pointing_game(tmp_path / "pointing")
    module.main([str(run), f"--page={page}", f"--pointing={tmp_path / 'pointing'}"])
    written = page.read_text(encoding="utf-8")
    between = re.compile(r"(<!-- measured: \w+ -->).*?(<!-- end: \w+ -->)", re.DOTALL)
    assert between.sub(r"\1\2", written) == between.sub(r"\1\2", given)
    assert module.faithfulness(module.Run.of(run)) in written
    assert module.pointing([tmp_path / "pointing"]) in written
    module.main([str(run), f"--page={page}", f"--pointing={tmp_path / 'pointing'}"])
    assert page.read_text(encoding="utf-8") == written
    page.write_text(given.replace("<!-- end: imagenet -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="must have one <!-- measured: imagenet -->"):
        module.main([str(run), f"--page={page}"])


def test_a_run_that_was_kept_has_the_same_tables_and_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, kept = script(), tmp_path / "kept"
    for _ in range(2):  # the second time over the first
        module.main([str(run), f"--keep={kept}"])
    printed = capsys.readouterr().out
    module.main([str(kept)])
    assert printed == 2 * capsys.readouterr().out
    assert [len(list(folder.iterdir())) for folder in kept.iterdir() if folder.is_dir()] == [1, 1]
    size, whole = (
        sum(file.stat().st_size for file in folder.rglob("*.parquet")) for folder in (kept, run)
    )
    assert size < whole / 2
    # All that both configurations ask for is there; what a higher limit adds is not.
    config = run.parent / "first-1.yaml"
    assert main(["benchmark", str(config), f"--output={kept}", "--data.limit=6"]) == 0
    assert "to do" not in capsys.readouterr().out
    assert main(["benchmark", str(config), f"--output={kept}", "--data.limit=9"]) == 0
    assert "first: going on, 2 of 3 groups are finished" in capsys.readouterr().out


def test_what_imagenet_would_take_is_counted(run: Path) -> None:
    module = script()
    text = module.imagenet(module.Run.of(run))
    maps = 0.0
    for method in ("GradCAM", "GradCAM++", "I-GOS", "XRAI", "SIGCAM"):
        own = [values(run, network)[method] for network in PHOTOS]
        maps += float(np.mean([np.mean([r["evaluations"] for r in o.values()]) for o in own]))
    assert f"five methods take {maps:,.0f} evaluations" in text
    total = 50_000 * 3 * (maps + 5 * 224)
    assert f"{total / 1e6:,.0f} million" in text
    assert f"{2 * total * (4.3 + 2.8 + 19.6) / 3 / 1e9:.1f} exa-operations" in text


def pointing_game(folder: Path) -> None:
    results = [
        Result(
            "gradcam",
            {
                "cat": ClassResult(2, {"0": 1.0, "15": 2.0}, 0.5),
                "dog": ClassResult(1, {"0": 0.0, "15": 0.0}, 0.2),
            },
            6,
            1.0,
        ),
        Result(
            "sigcam",
            {
                "cat": ClassResult(2, {"0": 2.0, "15": 2.0}, 0.6),
                "dog": ClassResult(1, {"0": 0.0, "15": 1.0}, 0.4),
            },
            2100,
            1.0,
        ),
    ]
    folder.mkdir()
    told = [details(result, (0, 15)) for result in results]
    (folder / "results.json").write_text(json.dumps(told))


def test_the_pointing_game_is_read_from_its_results(tmp_path: Path) -> None:
    module = script()
    pointing_game(tmp_path / "game")
    text = module.pointing([tmp_path / "game"])
    assert text.startswith("3 pairs of an image and one of 2 classes")
    header, _, first, second = cells(text)
    assert header[2] == "within 15 pixels"
    assert first[:6] == ["gradcam", "25.0", "50.0", "22.5", "2", "25.78"]
    assert second[:6] == ["sigcam", "50.0", "100.0", "35.0", "700", "38.64"]
    # Resamples of two classes: the difference is 0, 50 or 100 points.
    assert first[6] == "+50.0 [+0.0, +100.0]"
    assert second[6] == ""
    with pytest.raises(ValueError, match="name the output folder of a pointing game"):
        module.pointing([tmp_path])


def test_pointing_games_on_other_images_are_pooled(tmp_path: Path) -> None:
    module = script()
    pointing_game(tmp_path / "one")
    (tmp_path / "two").mkdir()
    other = Result("gradcam", {"cat": ClassResult(2, {"0": 2.0, "15": 2.0}, 1.5)}, 4, 1.0)
    (tmp_path / "two" / "results.json").write_text(json.dumps([details(other, (0, 15))]))
    text = module.pointing([tmp_path / "one", tmp_path / "two"])
    assert text.startswith("5 pairs of an image and one of 2 classes")
    # Of the cats 3 of 4 pairs hit, 4 of 4 within 15 pixels, with 2.0 / 4 of the heat; of the dogs none.
    assert cells(text)[2][:5] == ["gradcam", "37.5", "50.0", "35.0", "2"]


def test_every_image_of_coco_is_judged_in_one_fold(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "coco", train=9, val=5)
    script("coco_folds").main([str(root), str(tmp_path / "folds"), "--folds=3"])

    def samples(where: Path, split: str) -> dict[int, float]:
        data = CocoMultilabel.from_root(where, split, links=True)
        return {name: float(data[i][0].mean()) for i, name in enumerate(data.ids)}

    every = samples(root, "train2017") | samples(root, "val2017")
    judged: dict[int, float] = {}
    for k in range(3):
        val = samples(tmp_path / "folds" / str(k), "val2017")
        assert len(val) == 5 - (k == 2)
        assert samples(tmp_path / "folds" / str(k), "train2017") | val == every
        assert judged.keys().isdisjoint(val)
        judged |= val
    assert judged == every


def test_quality_against_cost_has_the_ceiling_as_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    module = script("fewer_evaluations")
    capsys.readouterr()
    # The second network has fewer photos than the configuration that was run last asked of the first.
    module.main([str(run), "--photos=odd", f"--plot={tmp_path / 'plots' / 'cost.svg'}"])
    header, _, *rows = cells(capsys.readouterr().out)
    assert header == ["", "evaluations", "first", "second", "mean", "mean, minus SIGCAM"]
    cost = {row[0]: number(row[1].replace(",", "")) for row in rows}
    assert (cost["random"], cost["GradCAM"], cost["GreedyRanking"]) == (0, 2, 4 * 5 - 2)
    for row in rows:
        for place, network in enumerate(PHOTOS, 2):
            own = values(run, network)[row[0]]
            mean = 100 * np.mean([own[image]["overall"] for image in (1, 3, 5)])
            assert number(row[place]) == pytest.approx(mean, abs=0.0501)
    drawn = (tmp_path / "plots" / "cost.svg").read_text()
    assert "ceiling: GreedyRanking, 18 evaluations" in drawn
    with pytest.raises(SystemExit, match="RISE is finished on no network"):
        module.main([str(run), "--reference=RISE"])


def test_two_settings_under_one_name_are_refused(run: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(run)
    assert manifest is not None
    folder = tmp_path / "copy"
    (folder / manifest.folders["first"]).mkdir(parents=True)
    one = Manifest("0", 1, "all", None, {"first": manifest.folders["first"]}, {"first": {}}, {})
    one.write(folder)
    from lightning_aop.experiments.results import write_part

    for digest in ("a", "b"):
        row = {"group": 0, "image": 0, "method": "EMP", "method_digest": digest}
        write_part(folder / manifest.folders["first"], 0, 0, [row])
    with pytest.raises(ValueError, match="results of 2 settings of EMP: run the configuration"):
        load(folder, everything=True)


def test_the_papers_differences() -> None:
    # Table 1 where it has both, else the mean over the networks of Table 2.
    assert reported_difference("overall", "SIGCAM", "GradCAM") == pytest.approx(57.66 - 48.12)
    assert reported_difference("deletion", "I-GOS", "EMP") == pytest.approx(8.76 - 12.70)
    two = reported_difference("overall", "I-GOS", "XRAI")
    first, second = (reported_overall("table2", name) for name in ("I-GOS", "XRAI"))
    assert first is not None
    assert second is not None
    assert two == pytest.approx(first - second, abs=0.02)
    assert reported("table1", "inception_v3", "XRAI") is None
    assert reported_difference("overall", "SIGCAM", "RISE") is None
    assert reported_pointing("I-GOS") == 35.72
    assert reported_pointing("EMP") is None
