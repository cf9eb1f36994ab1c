import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet, finish

from lightning_aop import fast_sigcam
from lightning_aop.metrics import Faithfulness

SCRIPT = Path(__file__).parents[1] / "scripts" / "distributed.py"


def run(
    out: Path, processes: int, probe: int, failing: int = -1, *targets: str
) -> dict[str, list[Any]]:
    """Return what each process found, by what was done; a hanging run ends the test."""
    out.mkdir()
    command = [sys.executable, SCRIPT, out, processes, probe, failing, *targets]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finish(command, env=environment, timeout=150, cwd=out)
    return {
        what: [torch.load(out / f"{what}-{rank}.pt") for rank in range(processes)]
        for what in ("validate", "fit")
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run(tmp_path_factory.mktemp("one") / "out", 1, 5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run(tmp_path_factory.mktemp("two") / "out", 2, 5)  # three and two of the five


@pytest.mark.wide
def test_two_processes_find_what_one_finds(
    one: dict[str, list[Any]], two: dict[str, list[Any]]
) -> None:
    (alone,), pair = one["validate"], two["validate"]
    for each in pair:
        assert each["warnings"] == []
        (mine,), (expected,) = each["found"], alone["found"]
        assert mine["maps"].shape == (5, 32, 32)
        torch.testing.assert_close(mine["maps"], expected["maps"], atol=1e-5, rtol=0)
        assert mine["values"] == pytest.approx(expected["values"], abs=1e-5, nan_ok=True)
        torch.testing.assert_close(mine["curves"], expected["curves"], atol=1e-5, rtol=0)
        assert mine["controls"].shape == (5, 2)
        torch.testing.assert_close(mine["controls"], expected["controls"], atol=1e-5, rtol=0)
        for name in ("", "_random_map", "_centre_gaussian"):
            key = f"explain/overall_auc{name}"
            assert each["metrics"][key] == pytest.approx(alone["metrics"][key], abs=1e-5)


@pytest.mark.slow
def test_each_process_has_maps_to_judge(tmp_path: Path) -> None:
    """Every second map, that of what the model says instead of the label, is not judged."""
    found = {
        processes: run(tmp_path / str(processes), processes, 4, -1, "confused")["validate"]
        for processes in (1, 2)
    }
    (expected,) = found[1][0]["found"]
    assert expected["maps"].shape == (8, 32, 32)
    assert expected["curves"].isnan().all(dim=(1, 2)).tolist() == [False, True] * 4
    for each in found[2]:
        assert each["warnings"] == []
        (mine,) = each["found"]
        for name in ("maps", "curves", "controls"):
            torch.testing.assert_close(
                mine[name], expected[name], atol=1e-5, rtol=0, equal_nan=True
            )


def test_all_processes_explain_the_first_one_s_network(two: dict[str, list[Any]]) -> None:
    first, second = (process["found"] for process in two["fit"])
    assert len(first) == len(second) == 4  # before training, and after 2, 4 and 6 steps
    statistics = "net.features.1.running_mean"
    assert not torch.equal(first[-1]["state"][statistics], second[-1]["state"][statistics])
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(24, 3, 32, 32, generator=generator)[:5]
    labels = torch.randint(0, 5, (24,), generator=generator)[:5]
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine["maps"], theirs["maps"])
        assert mine["values"] == pytest.approx(theirs["values"], rel=0, abs=0, nan_ok=True)
        network = SmallNet().eval()
        network.load_state_dict({k.removeprefix("net."): v for k, v in mine["state"].items()})
        expected = fast_sigcam(iterations=2).explain(network, images, labels)
        shown = torch.where(expected.amax(dim=(1, 2), keepdim=True) * 255 < 0.5, 0.0, expected)
        torch.testing.assert_close(mine["maps"], shown, atol=1e-5, rtol=0)
        metric = Faithfulness(steps=28)
        metric.update(network, images, expected, labels)
        for name, value in metric.compute().items():
            assert mine["values"][name] == pytest.approx(float(value), abs=1e-4)


def test_training_on_two_processes_is_what_it_was(
    two: dict[str, list[Any]], tmp_path: Path
) -> None:
    first, second = (process["state"] for process in two["fit"])
    for name in first:
        if "running" not in name:
            assert torch.equal(first[name], second[name])


@pytest.mark.slow
def test_fewer_pictures_than_processes(one: dict[str, list[Any]], tmp_path: Path) -> None:
    for each in run(tmp_path / "out", 2, 1)["validate"]:
        assert each["warnings"] == []
        expected = one["validate"][0]["found"][0]["maps"][:1]
        torch.testing.assert_close(each["found"][0]["maps"], expected, atol=1e-5, rtol=0)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("failing", "probe"),
    [*(pytest.param(rank, 4, marks=pytest.mark.slow) for rank in (0, 1)), (1, 1)],
)
def test_a_process_that_fails_stops_nobody(failing: int, probe: int, tmp_path: Path) -> None:
    results = run(tmp_path / "out", 2, probe, failing)
    for what in ("validate", "fit"):
        for rank, each in enumerate(results[what]):
            assert each["found"] == []
            words = "this process has had enough"
            where = "" if rank == failing else f"on process {failing}: "
            assert any(f"{where}RuntimeError: {words}" in text for text in each["warnings"])
    first, second = (process["state"] for process in results["fit"])
    assert torch.equal(first["net.head.weight"], second["net.head.weight"])


ALIKE = {  # rows of docs/reliability.md
    "gathering": "a forward that exchanges something, two processes (gloo)",
    "sharded": "FSDP2, two processes (gloo)",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALIKE)
def test_processes_that_need_each_other_in_a_forward_explain_alike(
    kind: str, tmp_path: Path, record_property: Any
) -> None:
    record_property("cell", ALIKE[kind])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finish([sys.executable, SCRIPT.with_name("alike.py"), tmp_path, kind], env=environment)
    found = {
        what: [torch.load(tmp_path / f"{what}-{rank}.pt") for rank in range(2)]
        for what in ("without", "with")
    }
    for without, watched in zip(found["without"], found["with"], strict=True):
        assert "explain/overall_auc" in watched["logged"]
        assert len(watched["maps"]) == 3
        for name, value in without["state"].items():
            assert torch.equal(value, watched["state"][name])
        pairs = zip(without["optimizer"], watched["optimizer"], strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
    first, second = (each["maps"] for each in found["with"])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    # The same on one process, with the weights whole.
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(24, 3, 32, 32, generator=generator)[:3]
    labels = torch.randint(0, 5, (24,), generator=generator)[:3]
    expected = fast_sigcam(iterations=2).explain(SmallNet(), images, labels)
    shown = torch.where(expected.amax(dim=(1, 2), keepdim=True) * 255 < 0.5, 0.0, expected)
    assert torch.equal(first[0], shown)


@pytest.mark.slow
def test_a_process_that_hangs_is_told_for_what_it_is(tmp_path: Path) -> None:
    told = finish([sys.executable, SCRIPT.with_name("hanging.py"), tmp_path / "meeting"])
    first, second = told.splitlines()  # the wait, and what comes after it
    assert first == second
    assert first.startswith("another process did not answer in time")
