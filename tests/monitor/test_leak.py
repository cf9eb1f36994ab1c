"""A run of any length holds no more than a short one."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import theilslopes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "scripts" / "leak.py"
EVERY = 10  # firings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, trims glibc's heap")


@pytest.fixture(
    scope="module",
    params=[pytest.param(120, marks=pytest.mark.wide), pytest.param(300, marks=pytest.mark.slow)],
)
def held(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return what a process of its own held, in which no other test has left free memory."""
    firings: int = request.param
    out = tmp_path_factory.mktemp("leak")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), str(firings)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = EventAccumulator(str(out / "with" / "version_0"), {"images": 0}).Reload()
    assert len(pictures.Images("explain/heatmaps")) == 1 + firings
    found: dict[str, Any] = json.loads((out / "held.json").read_text())
    assert found["step"] == list(range(EVERY, firings + 1, EVERY))
    return found


def test_memory_stays_flat(held: dict[str, Any]) -> None:
    warm = len(held["step"]) // 3
    # The median slope of all pairs: one block that the allocator adds is no leak.
    slope = theilslopes(held["kB"][warm:], held["step"][warm:]).slope
    print(f"\n{slope:.2f} kB a firing")
    # One map of these small pictures is 2.3 kB, and what is drawn of them 100 times as much. In a short
    # run the allocator has not settled: there a picture would be seen, in a long one a map.
    assert slope < (1.5 if held["step"][-1] >= 300 else 5)


def test_nothing_is_held_from_one_explanation_to_the_next(held: dict[str, Any]) -> None:
    for name in ("tensors", "hooks", "target layers", "figures", "threads"):
        assert len(set(held[name])) == 1, name
    assert held["hooks"][0] == held["figures"][0] == 0
    assert held["target layers"][0] == 1
    # TensorBoard opens its file anew for each writing.
    assert max(held["files"]) - min(held["files"]) <= 1
    objects = held["objects"][len(held["objects"]) // 3 :]
    assert max(objects) - min(objects) < held["step"][-1] / 10


def test_only_the_probe_is_held(held: dict[str, Any]) -> None:
    with_it, without = (
        Counter(tuple(shape) for shape in held[f"shapes {how}"]) for how in ("with", "without")
    )
    probe = [(2, 3, 24, 24), (2,)]
    for_all_runs = [(24, 24), (256, 3)]  # the blur of a side of 24 pixels, and the colours
    assert with_it - without == Counter(probe + for_all_runs)
    assert not without - with_it
