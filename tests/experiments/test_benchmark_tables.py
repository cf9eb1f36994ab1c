"""From entries to a table: intervals, differences, the paper's figures, and tables of any length."""

import csv
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import finish

from lightning_aop.cli.main import main
from lightning_aop.data.digests import described
from lightning_aop.experiments.paper import reported, reported_overall
from lightning_aop.experiments.results import Manifest, write_part
from lightning_aop.experiments.tables import Interval, Row, Table, bootstrap, summary, written
from lightning_aop.methods.names import METHODS
from lightning_aop.scores import softmax

pytest.importorskip("pyarrow")
POINTS = 9


def synthetic(
    output: Path,
    images: int,
    networks: tuple[str, ...] = ("densenet201", "vgg19"),
    methods: tuple[str, ...] = ("GradCAM", "SIGCAM"),
    failing: float = 0.0,
    group_size: int = 8,
    paper: str | None = "table2",
) -> dict[tuple[str, str], np.ndarray]:
    """Write the results of a run that never was; return deletion and insertion of each image."""
    generator = np.random.default_rng(5)
    digests = {name: f"digest of {name}" for name in methods}
    folders = {name: f"{name}-0" for name in networks}
    every = dict.fromkeys(networks, digests)
    Manifest("0", images, "all", paper, folders, every, {}).write(output)
    truth = {}
    for network in networks:
        values = generator.random((len(methods), images, 2))
        values[generator.random((len(methods), images)) < failing] = np.nan
        truth |= {(network, name): values[i] for i, name in enumerate(methods)}
        for start in range(0, images, group_size):
            rows: list[dict[str, Any]] = []
            for i, name in enumerate(methods):
                for image in range(start, min(start + group_size, images)):
                    deletion, insertion = (float(v) for v in values[i, image])
                    failed = np.isnan(deletion)
                    curve = None if failed else [0.5] * POINTS
                    rows.append(
                        {
                            "group": start // group_size,
                            "image": image,
                            "file": f"{image}.jpg",
                            "method": name,
                            "method_digest": digests[name],
                            "label": 1,
                            "predicted": image % 3,
                            "target": image % 3,
                            "correct": image % 3 == 1,
                            "score": 0.5,
                            "deletion": None if failed else deletion,
                            "insertion": None if failed else insertion,
                            "overall": None if failed else insertion - deletion,
                            "deletion_curve": curve,
                            "insertion_curve": curve,
                            "evaluations": None if failed else 2.0,
                            "seconds": None if failed else 0.25,
                            "curve_seconds": None if failed else 0.5,
                            "reason": "no map" if failed else None,
                        }
                    )
            write_part(output / folders[network], start // group_size, 0, rows)
    return truth


def test_the_bootstrap_is_that_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    values = generator.random((40, 3))
    values[generator.random((40, 3)) < 0.2] = np.nan
    means, drawn = bootstrap(values, resamples=50, seed=7)
    assert means == pytest.approx(np.nanmean(values, axis=0))
    rows = np.random.default_rng(7).integers(40, size=(50, 40))
    expected = [[np.nanmean(values[row, c]) for c in range(3)] for row in rows]
    np.testing.assert_allclose(drawn, expected)
    # The interval of a mean is that of the normal law, once there are enough values.
    many = np.random.default_rng(1).normal(3, 2, (5000, 1))
    _, means = bootstrap(many, resamples=2000)
    low, high = np.quantile(means, (0.025, 0.975))
    half = 1.96 * 2 / 5000**0.5
    assert (low, high) == pytest.approx((many.mean() - half, many.mean() + half), abs=0.1 * half)


def test_resamples_that_are_drawn_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((30, 2))
    whole = bootstrap(values, resamples=20)[1]
    monkeypatch.setattr("lightning_aop.experiments.tables._AT_ONCE", 100)
    np.testing.assert_allclose(bootstrap(values, resamples=20)[1], whole, rtol=1e-12)


def test_means_differences_and_the_paper_s_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = synthetic(tmp_path, 60, failing=0.1)
    table = summary(tmp_path, resamples=200)
    assert table.reference == "SIGCAM"
    rows = {(row.network, row.method): row for row in table.rows}
    assert list(rows) == [
        (n, m) for n in ("densenet201", "vgg19", "mean") for m in ("GradCAM", "SIGCAM")
    ]
    for (network, method), values in truth.items():
        row = rows[network, method]
        there = np.isfinite(values[:, 0])
        assert (row.images, row.failed) == (there.sum(), (~there).sum())
        assert row.correct == there[1::3].sum()
        assert row.deletion.mean == pytest.approx(np.nanmean(values[:, 0]))
        assert row.insertion.mean == pytest.approx(np.nanmean(values[:, 1]))
        overall = values[:, 1] - values[:, 0]
        assert row.overall.mean == pytest.approx(np.nanmean(overall))
        assert row.overall.low < row.overall.mean < row.overall.high
        assert (row.evaluations, row.seconds, row.curve_seconds) == (2, 0.25, 0.5)
        assert row.paper == reported("table2", network, method)
        other = truth[network, "SIGCAM"]
        if method == "SIGCAM":
            assert row.difference is None
        else:
            # Over the images that both have.
            paired = np.nanmean((other[:, 1] - other[:, 0]) - overall)
            assert row.difference is not None
            assert row.difference.mean == pytest.approx(paired)
    mean = rows["mean", "GradCAM"]
    both = [rows[n, "GradCAM"].overall.mean for n in ("densenet201", "vgg19")]
    assert mean.overall.mean == pytest.approx(np.mean(both))
    assert mean.paper == (None, None, 40.43)
    assert any("no map" in note for note in table.notes)
    assert main(["table", str(tmp_path), "--project=50000", "--resamples=10"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    # Two methods of 0.75 s each: 1.5 s x 50,000 / 3600.
    assert told.startswith("vgg19: 1.50 s per image")
    assert "50,000 images are 20.8 hours of one device" in told
    only = {(row.network, row.method): row for row in summary(tmp_path, images="correct").rows}
    values = truth["vgg19", "GradCAM"][1::3]
    assert only["vgg19", "GradCAM"].overall.mean == pytest.approx(
        np.nanmean(values[:, 1] - values[:, 0])
    )
    with pytest.raises(ValueError, match=r"no method .IGOS. in .*; there are GradCAM, SIGCAM"):
        summary(tmp_path, reference="IGOS")


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (("SIGCAM", "GradCAM"), "SIGCAM"),
        (("gradcam", "sigcam", "random", "centre"), "sigcam"),
        (("I-GOS", "XRAI", "edges"), "XRAI"),
        (("random", "centre"), "centre"),
    ],
)
def test_the_reference_is_the_paper_s_method_and_no_control(
    methods: tuple[str, ...], reference: str, tmp_path: Path
) -> None:
    synthetic(tmp_path, 4, methods=methods)
    assert summary(tmp_path, resamples=10).reference == reference


def test_a_control_is_known_by_its_settings_whatever_its_name(tmp_path: Path) -> None:
    told = {"mine": described(METHODS["gradcam"].build(None, softmax))}
    told["chance"] = described(METHODS["random"].build(None, softmax))
    settings = {"data": "photos", "net": {"network": "a network", "methods": told}}
    every = {"net": dict.fromkeys(told, "a digest")}
    assert Manifest("0", 1, "all", None, {}, every, settings).reference() == "mine"


def test_what_a_difference_knows_that_two_intervals_do_not(tmp_path: Path) -> None:
    """A method that is better by little on each image is better, however images differ."""
    synthetic(tmp_path, 1, methods=("A",))  # the manifest's form
    methods = {"A": "a", "B": "b"}
    Manifest("0", 100, "all", None, {"net": "net-0"}, {"net": methods}, {}).write(tmp_path)
    insertion = np.random.default_rng(0).random(100)
    for group in range(100):
        rows = [
            {
                "group": group,
                "image": group,
                "method": name,
                "method_digest": digest,
                "deletion": 0.0,
                "insertion": insertion[group] + 0.01 * (name == "B"),
                "overall": insertion[group] + 0.01 * (name == "B"),
            }
            for name, digest in methods.items()
        ]
        write_part(tmp_path / "net-0", group, 0, rows)
    a, b = summary(tmp_path).rows
    assert a.overall.high > b.overall.low
    assert a.difference is not None
    assert (a.difference.low, a.difference.high) == pytest.approx((0.01, 0.01))


def test_the_paper_s_figures_agree_with_themselves() -> None:
    """But for a hundredth, its overall scores are differences and means of its other figures."""
    for method in ("GradCAM", "GradCAM++", "I-GOS", "XRAI", "SIGCAM"):
        found = [reported("table2", n, method) for n in ("densenet201", "inception_v3", "vgg19")]
        three = [figures[1] - figures[0] for figures in found if figures is not None]
        assert len(three) == 3
        assert reported_overall("table2", method) == pytest.approx(np.mean(three), abs=0.011)
    for method in (
        "GradCAM",
        "WGradCAM",
        "EMP",
        "I-GOS",
        "GradCAM + EMP",
        "gradcam+igos",
        "SIGCAM",
    ):
        figures = reported("table1", "inception_v3", method)
        assert figures is not None
        assert figures[2] == pytest.approx(figures[1] - figures[0], abs=0.011)
    assert reported("table1", "vgg19", "GradCAM") is None
    assert reported(None, "vgg19", "GradCAM") is None


def test_all_formats_hold_the_same_figures() -> None:
    told = Interval(0.1234, 0.1, -0.5)
    rows = [
        Row("net_1", "A", told, told, told, told, (1.5, None, None), 1200, 7, 1, 2.5, 0.125, 0.5),
        Row("net_1", "B", told, told, told, None, (None,) * 3, 1200, 7, 0, *[np.nan] * 3),
        Row("net_2", "A", told, told, told, told, (None,) * 3, 9, 7, 0, 1.0, 1.0, 1.0),
    ]
    table = Table(rows, "B", ["100 % of it"])
    text, markdown, latex = (written(table, form) for form in ("text", "markdown", "latex"))
    for line in (text.splitlines()[1], markdown.splitlines()[2]):
        assert "12.34 [10.00, -50.00]" in line
        assert "+12.34 [+10.00, -50.00]" in line
        assert "1,200" in line
    assert {len(line.split("|")) for line in markdown.splitlines()[:5]} == {17}
    assert text.splitlines()[3] == ""  # between the networks
    assert "- 100 % of it" in markdown
    assert latex.count(r"\midrule") == 2
    body = [" ".join(line.split()) for line in latex.splitlines() if line.endswith(r"\\")]
    assert body[1].startswith(r"net\_1 & A & 12.34")
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", latex)
    assert columns is not None
    assert {line.count("&") + 1 for line in body} == {len(columns[1])} == {15}
    read = list(csv.DictReader(io.StringIO(written(table, "csv"))))
    assert read[0]["overall"] == "12.34"
    assert read[0]["difference_high"] == "-50.0"
    assert read[0]["paper_deletion"] == "1.5"
    assert read[1]["difference"] == read[1]["evaluations"] == ""


@pytest.mark.slow
def test_ten_thousand_images_take_seconds_and_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10,000 images x 5 methods x 3 networks, in groups of 32."""
    methods = ("GradCAM", "GradCAM++", "I-GOS", "XRAI", "SIGCAM")
    networks = ("densenet201", "inception_v3", "vgg19")
    pa = pytest.importorskip("pyarrow")
    fast_synthetic(pa, tmp_path, 10_000, networks, methods, group_size=32)
    script = (
        "import resource, sys, time\n"
        "from lightning_aop.cli.main import main\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
        "assert main(['table', sys.argv[1]]) == 0\n"
        "seconds = time.perf_counter() - start\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print('took', seconds, grown)"
    )
    told = finish([sys.executable, "-c", script, tmp_path], timeout=60)
    words = told.splitlines()[-1].split()
    unit = 1 if sys.platform == "darwin" else 1024
    seconds, grown = float(words[1]), int(words[2]) * unit / 2**20
    print(f"{seconds:.1f} s, {grown:.0f} MiB")
    assert "10,000" in told
    assert seconds < 30
    assert grown < 400


def fast_synthetic(
    pa: Any,
    output: Path,
    images: int,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    group_size: int,
) -> None:
    """Write the results of a long run by columns; with curves, which the table must not read."""
    from lightning_aop.experiments.results import schema

    generator = np.random.default_rng(0)
    digests = {name: f"digest of {name}" for name in methods}
    folders = {name: f"{name}-0" for name in networks}
    every = dict.fromkeys(networks, digests)
    Manifest("0", images, "all", "table2", folders, every, {}).write(output)
    for folder in folders.values():
        (output / folder).mkdir()
        for start in range(0, images, group_size):
            rows = np.arange(start, min(start + group_size, images), dtype=np.int32)
            n = len(rows) * len(methods)
            curves = generator.random((n, 113), dtype=np.float32)
            offsets = np.arange(0, n * 113 + 1, 113, dtype=np.int32)
            lists = pa.ListArray.from_arrays(offsets, pa.array(curves.ravel()))
            deletion, insertion = generator.random((2, n))
            names = [name for name in methods for _ in rows]
            columns = {
                "group": np.full(n, start // group_size, dtype=np.int32),
                "image": np.tile(rows, len(methods)),
                "file": [f"ILSVRC2012_val_{row:08d}.JPEG" for row in rows] * len(methods),
                "method": pa.array(names).dictionary_encode(),
                "method_digest": pa.array([digests[name] for name in names]).dictionary_encode(),
                "label": np.zeros(n, dtype=np.int32),
                "predicted": np.zeros(n, dtype=np.int32),
                "target": np.zeros(n, dtype=np.int32),
                "correct": np.ones(n, dtype=bool),
                "score": deletion,
                "deletion": deletion,
                "insertion": insertion,
                "overall": insertion - deletion,
                "deletion_curve": lists,
                "insertion_curve": lists,
                "evaluations": np.full(n, 2.0),
                "seconds": np.full(n, 0.5),
                "curve_seconds": np.full(n, 0.5),
                "reason": pa.nulls(n, pa.string()),
            }
            arrays = [
                (v if isinstance(v, pa.Array) else pa.array(v)).cast(schema().field(k).type)
                for k, v in columns.items()
            ]
            part = pa.Table.from_arrays(arrays, schema=schema())
            name = f"part-{start // group_size:06d}-0-00000000.parquet"
            pa.parquet.write_table(part, output / folder / name, compression="zstd")


@pytest.mark.parametrize("name", ["resamples", "project"])
def test_numbers_below_1(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path), f"--{name}=0"]) == 1
    assert f"--{name} 0: must be 1 or more" in capsys.readouterr().err
