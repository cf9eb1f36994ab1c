"""One list of commands, for the help, the dispatch and the messages."""

import re
import sys
from pathlib import Path

import pytest
from conftest import finish

from lightning_aop import __version__
from lightning_aop.cli.brief import COMMANDS as BRIEF
from lightning_aop.cli.configs import shipped_configs
from lightning_aop.cli.main import COMMANDS, main
from lightning_aop.cli.options import PARSERS
from lightning_aop.errors import InvalidValueError, UserError

NAMES = [command.name for command in COMMANDS]


def test_the_help_lists_each_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h"):
        assert main([word]) == 0
        text = capsys.readouterr().out
        assert re.findall(r"^  ([a-z][-a-z]*)  ", text, re.MULTILINE) == NAMES
        assert all(command.help in text for command in COMMANDS)
        assert all(name in text for name in shipped_configs())
    assert main([]) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", NAMES)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"lightning-aop {name}" in " ".join(capsys.readouterr().out.split())[:100].replace(
        "[options] ", ""
    )


def test_an_unknown_command_gets_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reprot", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-aop: reprot: there is no such command; did you mean report")
    assert said.rstrip().endswith(f"choose from {', '.join(NAMES)}")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("explain cat.jpg --targetclass 5", "--target-class"),
        ("compare cat.jpg --modle resnet18", "--model"),
        ("table run --refrence cam", "--reference"),
        ("fit --data.rot x", "--data.root"),
        ("benchmark --outptu x", "--output"),
    ],
)
def test_a_mistyped_option_gets_the_nearest(
    words: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: unrecognized arguments: --")
    assert f"; did you mean {nearest}" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("benchmark table2 --rules.pixels_per_step x", "x: a whole number is expected"),
        ("benchmark table2 --rules.target x", "x: one of 'predicted', 'label' is expected"),
        ("fit --config coco_resnet50 --data.horizontal_flip 3", "3: true or false is expected"),
        ("fit --config coco_resnet50 --trainer.limit_val_batches x", "x: a number is expected"),
    ],
)
def test_a_value_of_the_wrong_kind_of_a_nested_option_is_refused_in_one_line(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    option = words.split()[-2]
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {option} {told}"


@pytest.mark.parametrize(
    "words",
    [
        "benchmark table2 --methods [gradcam,gradcan]",
        "benchmark table2 --methods {CAM:gradcan}",
        "pointing-game --config table3 --method gradcan",
        "pointing-game --config table3 --method [gradcan]",
    ],
)
def test_a_mistyped_method_gets_the_nearest_in_one_line(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([word.replace(":", ": ") for word in words.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    option = words.split()[-2]
    assert said.startswith(
        f"error: {option} gradcan: there is no such name; did you mean gradcam or"
    )


@pytest.mark.parametrize("command", ["explain", "compare", "sanity-check"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("--size abc", "--size abc: a whole number from 1 on is expected"),
        ("--size 0", "--size 0: a whole number from 1 on is expected"),
        ("--mean 0.5 x 0.5", "--mean x: a number is expected"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(
    command: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "cat.jpg", *value.split()])
    assert stopped.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", " "))
    ]
    assert lines == [f"error: {told}"]


def test_every_module_of_a_command_is_a_file() -> None:
    folder = Path(sys.modules["lightning_aop.cli.main"].__file__ or "").parent
    assert {c.module for c in COMMANDS} <= {path.stem for path in folder.glob("*.py")}


def test_the_module_is_the_command() -> None:
    text = finish([sys.executable, "-m", "lightning_aop", "--help"])
    assert "Explain photos and draw the maps" in text
    assert finish([sys.executable, "-m", "lightning_aop", "--version"]).split()[-1] == __version__


@pytest.mark.sample(4)
@pytest.mark.parametrize("words", ["--help", *(f"{name} --help" for name in NAMES)])
def test_help_that_needs_no_torch_does_not_wait_for_it(words: str) -> None:
    script = (
        "import sys\n"
        "from lightning_aop.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    text = finish([sys.executable, "-c", script, *words.split()])
    assert text.split()[-1] == "False"


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 45


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [*PARSERS, *BRIEF])
def test_help_all_has_what_help_has_and_more(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            main([name, *words])
        texts.append(set(re.findall(r"(?<![-\w])--[a-z][-\w.]*", capsys.readouterr().out)))
    usual, every = texts
    assert usual <= every
    assert usual < every or name == "demo"


def run_demo_that_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lightning_aop.cli.demo.run", fail)
    return main(["demo"])


def test_an_error_of_the_user_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo_that_raises(monkeypatch, InvalidValueError("size must be at least 1")) == 1
    assert capsys.readouterr().err == "lightning-aop: size must be at least 1\n"


def test_debug_anywhere_shows_the_traceback_of_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert main(["report", missing]) == 1
    for words in (["--debug", "report", missing], ["report", missing, "--debug"]):
        with pytest.raises(UserError, match="no such folder"):
            main(words)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), RuntimeError("x")])
def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_demo_that_raises(monkeypatch, error)
