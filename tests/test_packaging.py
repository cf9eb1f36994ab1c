"""What is built, installed and imported."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

import lightning_aop

ROOT = Path(__file__).parents[1]

VENDORS = {
    *("wandb", "mlflow", "comet_ml", "neptune"),
    *("captum", "skimage", "sklearn", "scipy", "pycocotools", "pyarrow", "timm"),
    *("matplotlib.pyplot", "IPython", "jsonargparse"),
}


def built(folder: Path, into: Path) -> Path:
    """Build a wheel without the network, with the build backend of this environment."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", into],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", into],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (file,) = into.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    (text,) = (data for name, data in files(wheel).items() if name.endswith("/METADATA"))
    return email.message_from_bytes(text)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    found = {name for name in files(wheel) if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "lightning_aop", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {name.split("/")[0] for name in found} == {"lightning_aop"}
    assert {"lightning_aop/py.typed", "lightning_aop/history/page/page.html"} <= found
    assert "lightning_aop/configs/benchmark/table2.yaml" in found
    assert not [name for name in found if "pycache" in name or name.endswith(".pyc")]
    if tracked.returncode == 0:  # in a repository
        expected = {
            name if name.startswith("lightning_aop") else f"lightning_aop/{name}"
            for name in tracked.stdout.split()
        }
        assert expected <= found


def test_the_wheel_of_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {"tests/api.txt", "docs/reading.md", "examples/quickstart.py", "Makefile"} <= names
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert files(built(folder, tmp_path / "wheel")) == files(wheel)


def test_what_the_wheel_says_of_itself(wheel: Path) -> None:
    said = metadata(wheel)
    assert said["Name"] == "lightning-aop"
    assert said["Version"] == lightning_aop.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.10"
    extras = set(said.get_all("Provides-Extra", []))
    assert {"all", "benchmark", "coco", "methods", "wandb"} <= extras
    links = dict(url.split(", ") for url in said.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(links)
    assert len({link.split("/", 5)[4] for link in links.values()}) == 1  # one repository
    page = str(said.get_payload())
    assert "ExplanationMonitor" in page
    # On a package index there are no files beside the page.
    assert "](docs/" not in page
    assert "![" not in page


def run(script: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_vendor_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    found = run(
        """
        import sys
        import pytorch_lightning, torchmetrics, torchvision
        before = set(sys.modules)
        import lightning_aop.monitor.loggers
        from lightning_aop import *
        print(*sorted(set(sys.modules) - before))
        """,
        tmp_path,
    )
    assert not VENDORS & set(found.split())


def test_the_package_is_imported_without_torch_until_a_name_is_asked_for(tmp_path: Path) -> None:
    found = run(
        """
        import sys
        import lightning_aop
        print("torch" in sys.modules)
        assert hasattr(lightning_aop.metrics, "auc") and not hasattr(lightning_aop, "none")
        assert {*lightning_aop.__all__, "metrics"} <= {*dir(lightning_aop)}
        print("torch" in sys.modules)
        """,
        tmp_path,
    )
    assert found.split() == ["False", "True"]


@pytest.mark.slow
def test_the_import_takes_less_than_a_third_of_a_second(tmp_path: Path) -> None:
    times = [
        float(
            run(
                """
                import time
                import pytorch_lightning, torchmetrics, torchvision
                start = time.perf_counter()
                from lightning_aop import *
                print(time.perf_counter() - start)
                """,
                tmp_path,
            )
        )
        for _ in range(5)
    ]
    print(f"import lightning_aop: {sorted(times)[2]:.3f} s, median of 5")
    assert sorted(times)[2] < 0.3


def test_the_package_is_a_command(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "lightning_aop", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert lightning_aop.__version__ in found.stdout


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == "lightning_aop"
    assert citation["version"] == lightning_aop.__version__
    assert {"cff-version", "message", "authors", "type", "license"} <= set(citation)
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Rao", "Yang"]
    assert "Optimizing Activation Maps with Perturbation" in paper["title"]


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a repository only")
def test_the_workflow_runs_every_python_that_the_metadata_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["checks"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tried == re.findall(r"Python :: (3\.\d+)", project)
    for file in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))


def test_the_constraints_name_versions_alone() -> None:
    lines = (ROOT / "constraints-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r'[a-z0-9-]+==[\w.]+; python_version >= "3\.11"', pin), pin
        assert not pin.startswith(("nvidia-", "cuda-", "triton", "lightning-aop"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_prints_every_target_and_clean_keeps_the_runs() -> None:
    def said(*arguments: str) -> str:
        command = ["make", "--no-print-directory", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert phony is not None
    targets = set(phony[1].replace("\\\n", " ").split())
    assert {line.split()[1] for line in said().splitlines()} == targets
    assert not {"runs", "demo_run", "lightning_logs"} & set(said("--dry-run", "clean").split())
