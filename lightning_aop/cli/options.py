"""The options of the commands on photos; without torch, so that --help does not wait for it."""

import re
import sys
from argparse import SUPPRESS, HelpFormatter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lightning_aop.cli.configs import with_shipped_configs
from lightning_aop.errors import did_you_mean

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pnm"),
    *(".tif", ".tiff", ".jp2", ".avif"),
)
"""How photos end: what is taken of a folder, and what is never the name of a class."""


class Parser(ArgumentParser):  # type: ignore[misc, unused-ignore]
    """A parser that says which option a mistyped one may mean, and what a value should be."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, and exit."""
        super().error(in_a_line(self, message) + nearest_options(self, message), ex)


_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def in_a_line(parser: ArgumentParser, message: str) -> str:
    """Return what jsonargparse says of a value, over several lines and by types, as people say it."""
    key = re.match(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    wanted = "a whole number from 1 on" if "PositiveInt" in message else _expected(message)
    if key is None or value is None:
        return message
    options = (a.option_strings[-1] for a in parser._actions if a.dest == key[1])
    option = next(options, key[1]).removesuffix("+")  # as jsonargparse adds to a list
    if wanted:
        return f"{option} {value[1]}: {wanted} is expected"
    if mistyped := _mistyped(message):
        name, known = mistyped
        hint = did_you_mean(name, known)
        return f"{option} {name}: there is no such name{hint}; there are {', '.join(known)}"
    return message


def _mistyped(message: str) -> tuple[str, list[str]] | None:
    """Return the first given name that is none of those which a message lists, and these."""
    listed = re.search(r"typing\.Literal\[([^\]]*)\]", message)
    given = re.findall(r"Given value: (.*)", message)
    if listed is None or not given or "class_path" in given[-1]:
        return None
    known = re.findall(r"'([^']+)'", listed[1])
    value = given[-1]
    names = re.findall(r": '([^']+)'" if value.startswith("{") else r"'([^']+)'", value) or [value]
    unknown = [name for name in names if name not in known and re.fullmatch(r"[\w+]+", name)]
    return (unknown[0], known) if unknown else None


def _expected(message: str) -> str:
    """Return in words the kinds of value that a message lists; nothing where one has no word."""
    kinds = set(re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, re.MULTILINE))
    if "<class 'float'>" in kinds:
        kinds -= {"<class 'int'>"}
    words = []
    for kind in sorted(kinds - {"<class 'NoneType'>"}):
        simple = re.fullmatch(r"<class '(\w+)'>", kind)
        named = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        word = _KINDS.get(simple[1]) if simple else named and f"one of {named[1]}"
        if word is None:
            return ""
        words.append(word)
    return " or ".join(words)


def nearest_options(parser: ArgumentParser, message: str) -> str:
    """Return what `did_you_mean` says of the options that a message calls unrecognized."""
    _, _, words = message.partition("nrecognized arguments: ")
    unknown = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
    known = [name for action in parser._actions for name in action.option_strings]
    return "".join(did_you_mean(word, known) for word in unknown)


def parsed(build: Callable[[bool], ArgumentParser], words: Sequence[str]) -> Namespace:
    """Return the options of a command; `--help` shows the usual ones, `--help all` every one.

    Args:
        build: makes the parser, with the help of all options or of the usual ones.
        words: of the command line, after the command.
    """
    if wants_all(words):
        build(True).print_help()
        sys.exit(0)
    return build(False).parse_args(photos_first(with_shipped_configs(words)))


def wants_all(words: Sequence[str]) -> bool:
    """Say whether the words ask for the help of all options."""
    return any(o in ("-h", "--help") and what == "all" for o, what in pairwise(words))


def photos_first(words: Sequence[str]) -> list[str]:
    """Put photos first that follow an option with several values, which would take them for its own.

    `--target-class 281 cat.jpg` means the photo cat.jpg.
    """
    photos: list[str] = []
    others: list[str] = []
    several = False
    for word in words:
        if word.startswith("-") and len(word) > 1:
            several = word in ("--target-class", "--methods", "--layers", "--mean", "--std")
        (photos if several and _is_photo(word) else others).append(word)
    return photos + others


def _is_photo(word: str) -> bool:
    folder = ("/" in word or "\\" in word) and Path(word).is_dir()
    return word == "-" or word.lower().endswith(SUFFIXES) or folder


def explain_parser(full: bool = False) -> ArgumentParser:
    """Return the options of `lightning-aop explain`."""
    parser = _parser(
        "explain",
        "Show where in a photo a classifier sees a class. Writes one picture with every photo beside "
        "its heatmap, and prints how faithful each map is.",
        full,
    )
    _photo_options(parser, full)
    add = parser.add_argument
    add("--method", default="sigcam", metavar="NAME", help=_methods(full, "sigcam"))
    _output(parser, "explanation.png", "FILE", _PICTURE)
    add("--json", action="store_true", help="print a line of JSON for each map instead of text")
    return parser


def compare_parser(full: bool = False) -> ArgumentParser:
    """Return the options of `lightning-aop compare`."""
    parser = _parser(
        "compare",
        "Explain photos with many methods and draw the maps side by side: a row for each photo and "
        "class, a column for each method, and under each map its AUCs. Writes the picture, a CSV file "
        "and the maps; run it again after it was stopped, or with more photos or methods, and it "
        "goes on.",
        full,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="options in a file, or figure3, figure5"
    )
    _photo_options(parser, full)
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        default=["figure5"],
        metavar="NAME",
        help=f"names, 'all', or 'figure5' for those of the paper's figure; "
        f"{_methods(full, 'figure5')}",
    )
    add("--steps", type=int, default=28, help=_rare("of the curves; default: 28", full))
    add("--cell", type=int, default=160, help=_rare(f"{_CELL}; default: %(default)s", full))
    _output(parser, "comparison", "FOLDER", "where to write")
    add("--json", action="store_true", help="print a line of JSON for each map, not the table")
    return parser


def sanity_check_parser(full: bool = False) -> ArgumentParser:
    """Return the options of `lightning-aop sanity-check`."""
    parser = _parser(
        "sanity-check",
        "Give the layers of a network random weights, one after the other from the output to the "
        "input, and compare the maps with those of the trained network: a map that stays what it was "
        "does not show what the network has learnt (Adebayo et al. 2018). Ends in a verdict, a "
        "picture and a CSV file; run it again after it was stopped, and it goes on.",
        full,
    )
    _photo_options(parser, full)
    add = parser.add_argument
    add("--method", default="gradcam", metavar="NAME", help=_methods(full, "gradcam"))
    add(
        "--mode",
        default="cascading",
        choices=["cascading", "independent"],
        help="each layer on top of those before it (default), or alone",
    )
    add(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="these layers, in this order; default: all with weights",
    )
    add("--seed", type=int, default=0, help=_rare("of the random weights; default: 0", full))
    add("--cell", type=int, default=112, help=_rare(f"{_CELL}; default: %(default)s", full))
    _output(parser, "sanity_check", "FOLDER", "where to write")
    add("--json", action="store_true", help="print a line of JSON for each layer and the verdict")
    return parser


def cross_deletion_parser(full: bool = False) -> ArgumentParser:
    """Return the options of `lightning-aop cross-deletion`."""
    parser = _parser(
        "cross-deletion",
        "Blur the pixels of a photo in the order of the map of one class, and draw what becomes of "
        "that class's score and of another's. --target-class takes both: first the class that is "
        "removed, then the one that is watched.",
        full,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="options in a file, or figure1"
    )
    _photo_options(parser, full)
    add = parser.add_argument
    add("--method", default="sigcam", metavar="NAME", help=_methods(full, "sigcam"))
    add("--steps", type=int, default=112, help=_rare("of the curves; default: 112", full))
    _output(parser, "cross_deletion.png", "FILE", "PNG, PDF or SVG")
    return parser


def demo_parser(full: bool = False) -> ArgumentParser:
    """Return the options of `lightning-aop demo`."""
    parser = Parser(
        prog="lightning-aop demo",
        description="Train a small multilabel network on generated images, with an "
        "ExplanationMonitor attached, and say where to look. About a minute on two CPU cores.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("demo_run"), help="where to write; default: demo_run")
    return parser


PARSERS: dict[str, Callable[[bool], ArgumentParser]] = {
    "explain": explain_parser,
    "compare": compare_parser,
    "sanity-check": sanity_check_parser,
    "cross-deletion": cross_deletion_parser,
    "demo": demo_parser,
}
"""The commands whose module takes what these made of the words."""

_PICTURE = "the suffix decides the format: .png, .jpg, .webp, .pdf or .svg"
_CELL = "pixels of a map's longer side in the picture"


def _parser(name: str, description: str, full: bool) -> ArgumentParser:
    return Parser(
        prog=f"lightning-aop {name}",
        usage=f"lightning-aop {name} PHOTO ... [options]",
        description=description,
        epilog=None if full else "--help all shows the other options, and every method.",
        # jsonargparse's own adds types, and "default: null" after each default that is in words.
        formatter_class=HelpFormatter,
    )


def _photo_options(parser: ArgumentParser, full: bool) -> None:
    """Add the options that say which photos, which model, and how the one becomes input of the other."""
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="files, folders, or - for stdin")
    add(
        "--model",
        default="resnet50",
        metavar="NAME",
        help="a torchvision classifier, timm/NAME, hf/NAME of Hugging Face, or a folder that "
        "transformers saved; default: resnet50",
    )
    add(
        "--weights",
        type=Path | None,
        metavar="FILE",
        help="a local file; default: the published weights",
    )
    add(
        "--target-class",
        nargs="+",
        metavar="CLASS",
        help="index, name or wnid; default: the likeliest class",
    )
    add(
        "--classes",
        type=Path | None,
        metavar="FILE",
        help="names of the classes: a file with a line each, JSON (COCO's too), or a folder of folders",
    )
    add(
        "--target-layer",
        type=str | None,
        metavar="NAME",
        help="by name; default: the last feature map",
    )
    add(
        "--fit",
        choices=["crop", "squash"],
        help=_rare(
            "how a photo becomes square; default: crop, of checkpoints of fit as there", full
        ),
    )
    add(
        "--size",
        type=PositiveInt | None,
        metavar="PIXELS",
        help=_rare("default: what the model was published with", full),
    )
    add(
        "--score",
        choices=["softmax", "sigmoid"],
        help=_rare(
            "the class score: a probability among all classes, or of each class on its own; default: "
            "sigmoid for checkpoints of fit, other multilabel models and those of one class",
            full,
        ),
    )
    for name in ("--mean", "--std"):
        add(
            name,
            nargs="+",
            type=float,
            metavar="VALUE",
            help=_rare(
                "normalisation, one number or three, for values up to 1 or 255; default: the "
                "published weights'",
                full,
            ),
        )
    add(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help=_rare(
            "values shown black and white, for greyscale photos of more than 8 bits; default: 0 65535",
            full,
        ),
    )
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, …; default: a GPU, if any")


def _output(parser: ArgumentParser, default: str, metavar: str, what: str) -> None:
    """Add -o, whose other name needs no line of its own."""
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path(default),
        metavar=metavar,
        help=f"{what}; default: {default}",
    )


def _rare(text: str, full: bool) -> str:
    return text if full else SUPPRESS


def _methods(full: bool, default: str) -> str:
    usual = "sigcam, fast_sigcam (18 times faster), gradcam, layercam, rise, …"
    if full:
        from lightning_aop.methods.names import method_list

        usual = method_list()
    return f"how to explain: {usual}; default: {default}"
