"""What `--help` shows of the commands with hundreds of settings: those that are typed; without torch."""

from pathlib import Path

from lightning_aop.cli.configs import resolved, shipped_configs

_CONFIG = "--config NAME          a file, or one of {configs}"
_DATA = """\
--data.root FOLDER     in COCO's layout: train2017/, val2017/ and annotations/
--data.train NAME      the split to train with (train2017)
--data.val NAME        the split to validate with (val2017)
--data.size PIXELS     of the square that the network sees (224)
--data.on_error skip   leave images out that can't be read
--data.num_workers N   processes that read images (4)
--data.batch_size N    images in a batch (32)"""
_MODEL = """\
--model.backbone NAME  a torchvision network, or timm/NAME
--model.weights FILE   of the backbone; default: the published ones"""
_TRAINER = """\
--trainer.devices N    how many; also --trainer.accelerator cpu, --trainer.precision 16-mixed, …"""
_CHECKPOINT = "--ckpt_path FILE       the checkpoint of the trained network"

_TEXTS = {
    "fit": (
        "Train a multilabel classifier on a folder in COCO's format, with explanations on the way.",
        f"""\
{_CONFIG}
{_DATA}
--data.features cached compute what the frozen backbone gives once, and train the head on it
{_MODEL}
--model.train_backbone true  train all of the network, not only its head
--trainer.max_epochs N (10)
{_TRAINER}
--ckpt_path FILE       go on from this checkpoint""",
    ),
    "validate": ("Evaluate a classifier on the validation split.", ""),
    "test": ("Evaluate a classifier on the test split.", ""),
    "predict": ("Write the predictions of a classifier to a CSV file.", ""),
    "pointing-game": (
        "Measure whether the heat of a class lies on its objects, over a whole data set.",
        f"""\
{_CHECKPOINT}
--method NAME          sigcam, fast_sigcam (the default), gradcam, …, or a list: [gradcam, sigcam]
--output FOLDER        of the results (pointing_game)
{_CONFIG}
{_DATA}
{_MODEL}
{_TRAINER}""",
    ),
    "benchmark": (
        "Explain images with many methods on many networks, run deletion and insertion, and keep the "
        "values of\neach image. Run it again after it was stopped, and it goes on.",
        """\
CONFIG                 a file, or one of {benchmarks}
--output FOLDER        of the results
--data.root FOLDER     the images, in folders by class, flat with labels, or with labels.csv
--data.limit N         the first N images only
--data.shuffle_seed N  of them in a random order
--methods [A, B]       names of methods: sigcam, gradcam, …
--trainer.devices N    how many; also --trainer.strategy ddp, --trainer.accelerator cpu, …""",
    ),
}
COMMANDS = tuple(_TEXTS)
"""The commands that have such a text."""


def brief(command: str) -> str:
    """Return the short help of a command."""
    description, options = _TEXTS[command]
    options = options or "\n".join((_CHECKPOINT, _CONFIG, _DATA, _MODEL, _TRAINER))
    files = (Path(resolved(name)) for name in shipped_configs("benchmark"))
    # The others are for other commands.
    below = [file.stem for file in files if "\nnetworks:" in file.read_text()]
    options = options.replace("{configs}", ", ".join(shipped_configs()))
    options = options.replace("{benchmarks}", ", ".join(below))
    usage = "benchmark CONFIG" if command == "benchmark" else command
    lines = "\n".join(f"  {line}" for line in options.splitlines())
    return f"""\
usage: lightning-aop {usage} [options]

{description}

{lines}

  -h, --help [all]       this, or all settings
  --print_config         all settings with their values, as a file for --config"""
