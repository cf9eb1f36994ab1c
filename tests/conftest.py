"""Small real networks, and the switch that lets bad shapes through to our own messages."""

import copy
import os
import random
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

# The same examples in every run: a new one that fails is for those who look for it.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Lightning calls what jsonargparse means to drop.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# More threads only wait for each other where the machine has other work, as with networks this small.
torch.set_num_threads(1)


DISTRIBUTED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def finish(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end and return its output; one that fails or hangs shows its errors.

    One that hangs shows where each of its processes is, too.
    """
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words,
        env={**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"},
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # the handler prints the stacks
        try:
            output, errors = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
        pytest.fail(f"{words} did not end\n{output}\n{errors}")
    if process.returncode != 0:
        pytest.fail(f"{words} ended with {process.returncode}\n{output}\n{errors}")
    return output


@pytest.fixture(autouse=True)
def no_distributed_environment() -> Iterator[None]:
    """Forget what Lightning's launcher tells later processes.

    It leaves LOCAL_RANK and others in the environment of the process that it is called in; a command
    that inherits them takes itself for one that was launched, and waits for the others for ever.
    """
    before = {name: os.environ.get(name) for name in DISTRIBUTED}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class SmallNet(nn.Module):
    """Convolutions, BatchNorm, in-place ReLU, dropout, global pooling and a linear head."""

    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean(dim=(2, 3))
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model, and of the random streams, that could be disturbed."""
    numpy: Any = np.random.get_state()
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": [id(b) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": [torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2]],
        "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Compare bit for bit."""
    assert type(before) is type(after), where
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), where
        for index, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    else:
        assert before == after, where


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture
def double(net: nn.Module) -> nn.Module:
    """A network whose scores move with the picture, in float64."""
    network = copy.deepcopy(net).double()
    head: Any = network.head
    nn.init.normal_(head.weight, std=8.0, generator=torch.Generator().manual_seed(5))
    return network


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 40, 32, generator=generator), torch.tensor([0, 3, 1, 4])


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the shape checks off, as they are outside of tests, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real photos and weights, where LIGHTNING_AOP_DATA names one."""
    folder = os.environ.get("LIGHTNING_AOP_DATA")
    if not folder:
        pytest.skip("LIGHTNING_AOP_DATA names no folder of real photos and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with random weights of SqueezeNet 1.1, the smallest of the published networks."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


# --------------------------------------------------------------------------------------------------
# what runs always


@pytest.hookimpl(tryfirst=True)  # before rows are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rows of a test as wide, but for as many, evenly spread, as `sample` says."""
    rows: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            rows[item.nodeid.partition("[")[0]].append(item)
    for each in rows.values():
        sample = each[0].get_closest_marker("sample")
        assert sample is not None
        keep = min(sample.args[0], len(each))
        kept = {n * len(each) // keep for n in range(keep)}
        for n in set(range(len(each))) - kept:
            each[n].add_marker("wide")


# --------------------------------------------------------------------------------------------------
# the page that says what is proved


_cells: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", help="write the matrix of non-interference into this page", type=Path
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = dict(report.user_properties).get("cell")
    if report.when == "call" and isinstance(name, str):
        words = {"failed": "**not equal**", "skipped": "skipped", "passed": "equal"}
        found = {words[report.outcome], _cells.get(name, "equal")}
        _cells[name] = next(word for word in words.values() if word in found)  # of all tests of it


def pytest_sessionfinish(session: pytest.Session) -> None:
    page: Path | None = session.config.getoption("--reliability")
    if page is None:
        return
    import platform

    import pytorch_lightning

    before, rest = page.read_text().split("<!-- matrix -->")
    after = rest.split("<!-- end of matrix -->")[1]
    proved = sum(result == "equal" for result in _cells.values())
    rows = "\n".join(f"| {name} | {result} |" for name, result in _cells.items())
    refused = "| FSDP1, DeepSpeed | refused: the weights are shards, a map needs all |"
    table = (
        f"\n{proved} of {len(_cells)} cells are equal bit for bit, on {platform.system()} with Python "
        f"{platform.python_version()}, torch {torch.__version__.split('+')[0]} and Lightning "
        f"{pytorch_lightning.__version__}, on the CPU.\n\n"
        f"| how the model is trained | with and without the monitor |\n|---|---|\n{rows}\n{refused}\n"
    )
    page.write_text(f"{before}<!-- matrix -->{table}<!-- end of matrix -->{after}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window, where there is one."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
