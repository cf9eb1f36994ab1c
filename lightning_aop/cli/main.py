"""The `lightning-aop` command: the list of its commands, and what the user sees of an error."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import NamedTuple

from lightning_aop._version import __version__
from lightning_aop.cli import brief, options
from lightning_aop.cli.configs import shipped_configs
from lightning_aop.errors import UserError, did_you_mean


class Command(NamedTuple):
    """A command, and the module of `lightning_aop.cli` whose `main` runs it.

    `main` gets the words from the command's name on, or of a command in `options.PARSERS` its options,
    and returns the exit status. The module is imported when the command is run, not before: torch and
    Lightning take seconds.
    """

    name: str
    help: str
    module: str


COMMANDS = (
    Command("explain", "Explain photos and draw the maps.", "explain"),
    Command("compare", "Explain photos with many methods, side by side.", "compare"),
    Command(
        "cross-deletion",
        "Blur one class of a photo away, and watch another's score.",
        "cross_deletion",
    ),
    Command(
        "sanity-check",
        "Randomise the network's layers, and see whether the maps change.",
        "sanity_check",
    ),
    Command("demo", "Watch a small network learn, offline.", "demo"),
    Command("fit", "Train a multilabel classifier on a folder in COCO's format.", "training"),
    Command("validate", "Evaluate it on the validation split.", "training"),
    Command("test", "Evaluate it on the test split.", "training"),
    Command("predict", "Write its predictions to a CSV file.", "training"),
    Command(
        "pointing-game", "Measure whether the heat of a class lies on its objects.", "training"
    ),
    Command("report", "Make the page and the animation of a run again.", "report"),
    Command(
        "benchmark",
        "Evaluate methods on networks over many images: the paper's tables.",
        "benchmark",
    ),
    Command("table", "Print the results of a benchmark.", "table"),
    Command("curves", "Draw the mean curves of a benchmark.", "curves"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # A name that the terminal can't show is no reason to lose what was computed.
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning-aop {__version__}")
        return 0
    modules = {command.name: command.module for command in COMMANDS}
    if words[0] not in modules:
        hint = did_you_mean(words[0], modules)
        print(
            f"lightning-aop: {words[0]}: there is no such command{hint}; choose from "
            f"{', '.join(modules)}",
            file=sys.stderr,
        )
        return 2
    try:
        return _run(words, modules[words[0]])
    except KeyboardInterrupt:
        print("lightning-aop: stopped", file=sys.stderr)
        return 130
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # which a trainer ends by exit(1)
            return 130
        raise
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` goes; the interpreter would complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # Anything else is a bug of this package or of the user's own code, and needs its traceback.
        if debug or not isinstance(error, UserError):
            raise
        print(f"lightning-aop: {_message(error)}", file=sys.stderr)
        return 1


def _run(words: list[str], module: str) -> int:
    """Run a command, whose module is imported once its words make sense."""
    name, rest = words[0], words[1:]
    if name in brief.COMMANDS and {"-h", "--help"} & set(rest):
        if not options.wants_all(rest):
            print(brief.brief(name))
            sys.exit(0)  # as argparse does
        words = [name, "--help"]
    parser = options.PARSERS.get(name)
    what = words if parser is None else options.parsed(parser, rest)
    status: int = import_module(f"lightning_aop.cli.{module}").main(what)
    return status


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = "\n".join(f"  {command.name:<{width}}  {command.help}" for command in COMMANDS)
    return f"""\
usage: lightning-aop COMMAND [options]

See what a PyTorch Lightning model looks at while it trains.

{lines}

  -h, --help   Show this, or after a command its options; COMMAND --help all shows every one.
  --version    Print the version.
  --debug      Show the traceback of every error.

fit, validate, test, predict and pointing-game take --config FILE or the name of a configuration that
comes with the package ({", ".join(shipped_configs())}),
and options that override it."""


def _message(error: BaseException) -> str:
    text = str(error)
    # An error of a DataLoader's worker comes with its traceback, the error itself last.
    return (
        text.strip().splitlines()[-1].split("Error: ", 1)[-1] if "worker process" in text else text
    )
