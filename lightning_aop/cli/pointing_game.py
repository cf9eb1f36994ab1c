"""`lightning-aop pointing-game`: does the heat of a class lie on its objects, over a whole data set?"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_aop.cli import trainer
from lightning_aop.cli.store import make_folder
from lightning_aop.coco import CocoClassification, MultilabelClassifier
from lightning_aop.data.networks import fill
from lightning_aop.data.weights import read_content, read_weights
from lightning_aop.errors import UserError
from lightning_aop.experiments.pointing_game import Rules, details, name_of, play, table
from lightning_aop.methods.names import MethodName, coco_method
from lightning_aop.types import SaliencyMethod


class Trainer(trainer.Trainer):
    """Lightning's trainer, with one more thing to do."""

    def pointing_game(
        self,
        model: MultilabelClassifier,
        datamodule: CocoClassification,
        ckpt_path: str | None = None,
        method: MethodName | SaliencyMethod | list[MethodName | SaliencyMethod] = "fast_sigcam",
        rules: Rules = Rules(),  # noqa: B008
        masks: Literal["segmentation", "box"] | None = None,
        output: Path = Path("pointing_game"),
    ) -> None:
        """Run the pointing game: does the heat of a class lie on its objects?

        A run that was stopped goes on where it was when it is started again. Writes a table and
        the values of each class to `output`.

        Args:
            model: what is explained.
            datamodule: its validation split is explained.
            ckpt_path: the checkpoint of the trained model.
            method: how to explain: a name, a class with its arguments, or a list of these. By name,
                the methods have the paper's settings for COCO.
            rules: what is counted.
            masks: what a hit lies on, as in `rules`: "box" is the rule of VOC.
            output: the folder of the results.
        """
        datamodule.prepare_data()
        datamodule.setup("validate")
        assert ckpt_path is not None, "seen to by the command line"
        if method == []:
            raise UserError("pointing-game: no method is named; name one: --method sigcam")
        make_folder(output)
        checkpoint: Any = read_content(Path(ckpt_path))
        model.on_load_checkpoint(checkpoint)
        fill(model, "the network that fit trained", read_weights(Path(ckpt_path)))
        data = datamodule.dataset("val")
        model.check_classes(data.classes)
        rules = replace(rules, masks=masks or rules.masks)
        results = []
        for chosen in method if isinstance(method, list) else [method]:
            name = chosen if isinstance(chosen, str) else name_of(chosen)
            way = coco_method(chosen) if isinstance(chosen, str) else chosen
            workers = datamodule.num_workers
            results.append(play(self, model, data, way, name, output, rules, workers))
            if self.is_global_zero:
                text = table(results, rules.tolerances)
                (output / "table.md").write_text(text + "\n")
                every = [details(result, rules.tolerances) for result in results]
                (output / "results.json").write_text(json.dumps(every, indent=1))
        datamodule.teardown("validate")
        if self.is_global_zero:
            if left := results[0].skipped:
                text += f"\n\n{left} (image, class) pairs were left out: no mask tells where it is"
                text += "" if rules.masks == "box" else "; --masks box takes the boxes"
            print(f"\n{text}\n\nwrote {output / 'table.md'} and {output / 'results.json'}")


# What the subcommand is called, beside what Python allows.
setattr(Trainer, "pointing-game", Trainer.pointing_game)
