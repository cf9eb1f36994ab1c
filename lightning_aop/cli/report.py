"""`lightning-aop report`: write the page and the animation of a run again, from its stored maps."""

from collections.abc import Sequence
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
        "run may still be going on.",
    )
    add = parser.add_argument
    add("run", type=Path, help="the folder of a run, or of several")
    add("--seconds", type=float, default=0.5, help="how long the animation shows an epoch")
    add("--explanations", type=int, default=12, help="the largest number of maps in the animation")
    return parser


def report(options: Namespace) -> int:
    """Write the page and the animation into each folder that has a history."""
    # Imported here, so that --help does not wait for torch.
    from lightning_aop.history.animation import write_animation
    from lightning_aop.history.report import write_report
    from lightning_aop.history.store import History

    for name in ("seconds", "explanations"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} {getattr(options, name)}: must be above 0")
    if not options.run.is_dir():
        raise UserError(f"{options.run}: no such folder{did_you_mean_file(options.run)}")
    folders = sorted(path.parent for path in options.run.rglob("run.json") if _is_ours(path.parent))
    if not folders:
        raise UserError(
            f"{options.run} holds no explanations: name the folder of a run with an "
            "ExplanationMonitor, such as lightning_logs/version_0"
        )
    failures = 0
    for folder in folders:
        try:
            history = History.load(folder)
            failures += bool(history.lost)
            for problem in history.lost:
                print(f"{folder}: {problem}")
            print(write_report(folder))
            if history.records:
                seconds, count = options.seconds, options.explanations
                print(*write_animation(folder, seconds=seconds, explanations=count), sep="\n")
        except (ValueError, OSError) as error:
            failures += 1
            print(f"{folder}: {error}")
    return 1 if failures else 0


def _is_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("images.npy", "maps.npy", "history.jsonl"))
