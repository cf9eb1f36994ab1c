"""`lightning-aop report`: write what is made of a run's stored maps again, or of two runs."""

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_aop.cli.options import Parser
from lightning_aop.errors import UserError, did_you_mean_file


def main(words: Sequence[str]) -> int:
    """Run the command on its words."""
    return report(report_parser().parse_args(words[1:]))


def report_parser() -> ArgumentParser:
    """Return the options of `lightning-aop report`."""
    parser = Parser(
        prog="lightning-aop report",
        description="Make report.html, evolution.gif and, where ffmpeg is installed, evolution.mp4 of "
        "every run in a folder, from the maps and metrics that its ExplanationMonitor has stored; the "
        "run may still be going on. Several monitors of a run, and several runs, are compared in a page "
        "comparison.html.",
    )
    add = parser.add_argument
    add(
        "run",
        type=Path,
        nargs="+",
        help="the folder of a run, or of several; two or more, each of one run, to compare them",
    )
    add("--seconds", type=float, default=0.5, help="how long the animation shows an epoch")
    add("--explanations", type=int, default=12, help="the largest number of maps in the animation")
    add("--figure", type=Path, help="write this PDF, SVG, EPS or PNG for a paper instead")
    add("--rows", type=int, nargs="+", help="the explanations of the figure, from 0; the first 4")
    add("--epochs", type=int, nargs="+", help="its epochs, -1 for before training; evenly spread")
    add("--columns", type=int, default=1, help="1 or 2, the columns of the paper it is as wide as")
    add("--export", help="write the numbers instead: csv or json")
    return parser


def report(options: Namespace) -> int:
    """Write what is asked for into, or of, each folder that has a history."""
    for name in ("seconds", "explanations"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} {getattr(options, name)}: must be above 0")
    if options.export not in (None, "csv", "json"):
        raise UserError(f"--export {options.export}: must be csv or json")
    found = [_folders(run) for run in options.run]
    if len(found) > 1 or options.figure is not None:
        for run, folders in zip(options.run, found, strict=True):
            if len(folders) > 1:
                names = ", ".join(str(folder) for folder in folders[:3])
                raise UserError(f"{run} holds {len(folders)} histories: name one, such as {names}")
    folders = [folder for each in found for folder in each]
    if options.figure is not None:
        return _figure(options, folders)
    if options.export is not None:
        return _each(folders, lambda folder: _exported(folder, options.export))
    if len(found) > 1:
        return _compared(folders, folders[0] / "comparison.html")
    failures = _each(folders, lambda folder: _remade(folder, options))
    for parent, monitors in groupby(folders, key=lambda folder: folder.parent):
        several = list(monitors)
        if len(several) > 1:
            failures |= _compared(several, parent / "comparison.html")
    return failures


def _folders(run: Path) -> list[Path]:
    if run.is_file():
        raise UserError(f"{run}: it is a file; name the folder of a run")
    if not run.is_dir():
        raise UserError(f"{run}: no such folder{did_you_mean_file(run)}")
    folders = sorted(path.parent for path in run.rglob("run.json") if _is_ours(path.parent))
    if not folders:
        raise UserError(
            f"{run} holds no explanations: name the folder of a run with an ExplanationMonitor, such "
            "as lightning_logs/version_0"
        )
    return folders


def _is_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("images.npy", "maps.npy", "history.jsonl"))


def _each(folders: Sequence[Path], work: Callable[[Path], list[str]]) -> int:
    """Do the work on each folder, and tell what it says; return 1 where something could not be read."""
    # Imported here, so that --help does not wait for torch.
    from lightning_aop.history.store import History

    failures = 0
    for folder in folders:
        try:
            lost = History.load(folder).lost
            failures += bool(lost)
            for problem in lost:
                print(f"{folder}: {problem}", file=sys.stderr)
            print(*work(folder), sep="\n")
        except (ValueError, OSError) as error:
            failures += 1
            print(f"{folder}: {error}", file=sys.stderr)
    return 1 if failures else 0


def _remade(folder: Path, options: Namespace) -> list[str]:
    from lightning_aop.history.animation import write_animation
    from lightning_aop.history.report import write_report
    from lightning_aop.history.store import History

    made = [write_report(folder)]
    if History.load(folder).records:
        seconds, count = options.seconds, options.explanations
        made += write_animation(folder, seconds=seconds, explanations=count)
    return [str(path) for path in made]


def _exported(folder: Path, kind: str) -> list[str]:
    from lightning_aop.history.export import write_numbers

    return [str(write_numbers(folder, kind))]


def _figure(options: Namespace, folders: Sequence[Path]) -> int:
    from lightning_aop.history.figure import write_figure

    if len(folders) > 1:
        raise UserError(f"--figure is of one run, not of {len(folders)}")

    def made(folder: Path) -> list[str]:
        chosen = {} if options.rows is None else {"explanations": options.rows}
        return [
            str(
                write_figure(
                    folder, options.figure, epochs=options.epochs, columns=options.columns, **chosen
                )
            )
        ]

    return _each(folders, made)


def _compared(folders: Sequence[Path], path: Path) -> int:
    from lightning_aop.history.report import write_comparison

    try:
        print(write_comparison(folders, path))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
