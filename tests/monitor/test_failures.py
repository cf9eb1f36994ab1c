"""The samples that validation fails at: who they are, since when, and that nothing else changes."""

import copy
import io
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, finish
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from test_harmless import Cell, Watch, assert_same, train
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_aop import GradCAM
from lightning_aop.history import History, picture_of
from lightning_aop.model.passes import count_evaluations
from lightning_aop.monitor.failures import is_steady
from lightning_aop.scores import contrast, softmax

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]

GENERATOR = torch.Generator().manual_seed(9)
# Of a colour each, so that scores differ.
IMAGES = torch.rand(30, 3, 24, 24, generator=GENERATOR) * torch.rand(
    30, 3, 1, 1, generator=GENERATOR
)
LABELS = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(8))


class Module(pl.LightningModule):
    """Validates by its forward, by its network, or by two parts of it."""

    net: Any

    def __init__(self, how: str = "forward", kind: str = "classes") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = SmallNet()
        self.net.head.weight.data *= 20
        self.softmax = nn.Softmax(dim=1)
        self.how, self.kind, self.lr = how, kind, 0.5
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.net(images))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "multilabel":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return nn.functional.cross_entropy(logits, labels)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Any:
        images = batch[0]
        if self.how == "forward":
            logits = self(images)
        elif self.how == "network":
            logits = self.net(images)
        elif self.how == "returned":
            with torch.no_grad():
                logits = nn.functional.linear(
                    self.net.features(images).mean(dim=(2, 3)),
                    self.net.head.weight,
                    self.net.head.bias,
                )
            return {"logits": logits}
        elif self.how == "hidden":
            pooled = self.net.features(images).mean(dim=(2, 3))
            logits = nn.functional.linear(pooled, self.net.head.weight, self.net.head.bias)
            return None
        else:
            logits = self.net.head(self.net.features(images).mean(dim=(2, 3)))
        self.softmax(logits)  # is no network's output
        self.seen.append(logits.detach())
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": CSVLogger(folder, name="log"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=[*callbacks], **(defaults | settings))


def loaders(labels: Tensor = LABELS, **settings: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = TensorDataset(IMAGES, labels)
    return DataLoader(data, batch_size=10), DataLoader(data, batch_size=7, **settings)


def slow_choice(
    logits: Tensor, before: list[bool], count: int, labels: Tensor = LABELS
) -> dict[int, str]:
    """Return which samples are the worst, and why, one after the other."""
    rows = range(len(logits))
    log = logits.log_softmax(dim=1)
    losses = [-float(log[i, labels[i]]) for i in rows]
    wrong = [int(logits[i].argmax()) != int(labels[i]) for i in rows]
    sure = [float(log[i].exp().max()) for i in rows]
    orders = {
        "highest loss": sorted(rows, key=lambda i: -losses[i]),
        "newly wrong": sorted(
            (i for i in rows if wrong[i] and before[i]), key=lambda i: -losses[i]
        ),
        "wrongly sure": sorted((i for i in rows if wrong[i]), key=lambda i: -sure[i]),
    }
    chosen: dict[int, str] = {}
    for rank in rows:
        for why, order in orders.items():
            # Of each kind no more are looked at than are asked for.
            if rank < min(len(order), count) and len(chosen) < count:
                chosen.setdefault(order[rank], why)
    return chosen


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", ["forward", "network", "layers"])
def test_they_are_the_worst_of_a_slow_loop_and_are_told_when_they_come_and_go(
    how: str, tmp_path: Path
) -> None:
    monitor = Watch(failures=5)
    run, module = trainer(tmp_path, monitor), Module(how)
    run.fit(module, *loaders())
    folder = Path(run.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]
    records = History.load(folder).failures
    assert [record.epoch for record in records] == [0, 1, 2]
    logits = torch.cat(module.seen[2:]).split(30)  # but for the sanity check's
    right = [False] * 30
    entered: dict[int, str] = {}
    for record, each in zip(records, logits, strict=True):
        expected = slow_choice(each, right, 5)
        assert {s["index"]: s["why"] for s in record.samples} == expected
        gone = {index: title for index, title in entered.items() if index not in expected}
        assert sorted(s["entered"] for s in record.left) == sorted(gone.values())
        assert all(s["left"] == record.title for s in record.left)
        entered = {index: entered.get(index, record.title) for index in expected}
        right = (each.argmax(dim=1) == LABELS).tolist()
        for sample in record.samples:
            index = sample["index"]
            assert sample["entered"] == entered[index]
            loss = nn.functional.cross_entropy(each[index : index + 1], LABELS[index : index + 1])
            assert sample["loss"] == pytest.approx(float(loss), abs=1e-3)
            assert sample["labels"] == [int(LABELS[index])]
            assert sample["predicted"] == int(each[index].argmax())
            both = [int(LABELS[index]), sample["predicted"]]
            assert sample["targets"] == (both if both[0] != both[1] else both[:1])
            assert len(sample["maps"]) == len(sample["targets"])
    assert any(s["why"] == "newly wrong" for record in records for s in record.samples)
    assert any(record.left for record in records), "the test needs samples that leave"
    # Each image is stored once, as it is shown.
    images = {key: url for record in records for key, url in record.images.items()}
    assert sum(len(record.images) for record in records) == len(images)
    index = {s["id"]: s["index"] for record in records for s in record.samples}
    for key, url in images.items():
        shown = (IMAGES[index[key]] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(picture_of(url), shown)
    assert list(folder.parent.rglob("failures/*.png"))


def test_maps_are_the_methods_and_no_average_knows_of_them(tmp_path: Path) -> None:
    found = []
    for count in (0, 4):
        torch.manual_seed(0)
        monitor = Watch(failures=count, metrics=True)
        run, module = trainer(tmp_path / str(count), monitor), Module()
        run.fit(module, *loaders())
        timed = ("seconds", "overhead")
        found.append(
            {k: v for k, v in run.callback_metrics.items() if k.split("/")[1] not in timed}
        )
    assert_same(*found)
    folder = Path(run.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]
    last = History.load(folder).failures[-1]
    for sample in last.samples:
        for target, url in zip(sample["targets"], sample["maps"], strict=True):
            image = IMAGES[sample["index"]][None]
            expected = GradCAM().explain(module, image, torch.tensor([target]))[0]
            drawn = torch.from_numpy(picture_of(url)).float() / 255
            torch.testing.assert_close(drawn, expected, atol=0.003, rtol=0)


def test_the_validation_is_not_evaluated_again(tmp_path: Path) -> None:
    counts = []
    for count in (0, 4):
        module = Module()
        monitor = Watch(failures=count, probe=2)
        with count_evaluations(module.net) as evaluations:
            trainer(tmp_path, monitor).validate(module, loaders()[1], verbose=False)
        counts.append(evaluations.total)
    # Four logits for what to explain, and a map of two evaluations each for label and prediction; the
    # layer is found already.
    assert counts[1] - counts[0] <= 4 + 2 * 8
    assert counts[1] - counts[0] < 30


def test_multilabel_failures(tmp_path: Path) -> None:
    labels = (torch.rand(30, 5, generator=torch.Generator().manual_seed(5)) > 0.6).float()
    labels[:, 0] = 1
    module = Module(kind="multilabel")
    run = trainer(tmp_path, Watch(failures=3), max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, *loaders(labels))
    folder = Path(run.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]
    (record,) = History.load(folder).failures
    logits = torch.cat(module.seen)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    worst = losses.mean(dim=1).argsort(descending=True).tolist()
    assert record.samples[0]["index"] == worst[0]
    for sample in record.samples:
        assert sample["labels"] == labels[sample["index"]].nonzero()[:, 0].tolist()
        assert len(sample["maps"]) >= min(len(sample["labels"]), 3)


def test_returned_logits_count_and_without_any_a_sentence_says_so(tmp_path: Path) -> None:
    monitor = Watch(failures=3)
    trainer(tmp_path, monitor).validate(Module("returned"), loaders()[1], verbose=False)
    assert len(monitor._run.failures.now) == 3  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="no failures are shown: the validation step computes no"):
        trainer(tmp_path, Watch(failures=3)).validate(Module("hidden"), loaders()[1], verbose=False)


def test_a_shuffled_loader_has_its_worst_but_nothing_is_newly_wrong(tmp_path: Path) -> None:
    run = trainer(tmp_path, Watch(failures=6))
    with pytest.warns(UserWarning, match="shuffling enabled"):
        run.fit(Module(), *loaders(shuffle=True))
    folder = Path(run.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]
    records = History.load(folder).failures
    assert {s["why"] for r in records for s in r.samples} == {"highest loss", "wrongly sure"}
    # The same image is known again, wherever it is now.
    assert any(s["entered"] != r.title for r in records for s in r.samples)


def test_hooks_are_gone_after_the_validation_and_after_one_that_breaks_off(tmp_path: Path) -> None:
    class Breaking(Module):
        def validation_step(self, *arguments: Any) -> Any:
            assert any(m._forward_hooks for m in self.modules())
            if self.how == "network":
                raise RuntimeError("broken off")
            return super().validation_step(*arguments)

        def on_validation_batch_end(self, *arguments: Any) -> None:
            assert not any(m._forward_hooks for m in self.modules())

    for how in ("forward", "network"):
        module = Breaking(how)
        run = trainer(tmp_path, Watch(failures=2))
        if how == "network":
            with pytest.raises(RuntimeError, match="broken off"):
                run.validate(module, loaders()[1], verbose=False)
        else:
            run.validate(module, loaders()[1], verbose=False)
        assert not any(m._forward_hooks for m in module.modules())


CELLS = [
    Cell("failures followed", monitor=lambda: Watch(failures=4)),
    Cell(
        "failures followed, bf16-mixed, steps accumulated",
        trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        monitor=lambda: Watch(failures=4),
    ),
]


@pytest.mark.filterwarnings("ignore:.*precision")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_training_is_what_it_was(cell: Cell, tmp_path: Path) -> None:
    monitor = cell.monitor()
    without = train(cell, tmp_path / "without", None)
    assert_same(without, train(cell, tmp_path / "with", monitor))
    assert len(monitor._run.failures.now) == 4  # type: ignore[union-attr]


def test_a_resumed_run_knows_since_when_and_goes_on_in_the_file(tmp_path: Path) -> None:
    def run(epochs: int, **settings: Any) -> Path:
        checkpoint = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit = trainer(tmp_path, Watch(failures=4), checkpoint, max_epochs=epochs)
        module = Module()
        module.lr = 1e-4
        fit.fit(module, *loaders(), **settings)
        return Path(fit.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]

    first = History.load(run(2)).failures
    folder = run(3, ckpt_path=tmp_path / "saved" / "last.ckpt")
    records = History.load(folder).failures
    assert records[:2] == first
    assert [record.epoch for record in records] == [0, 1, 2]
    since = {s["id"]: s["entered"] for s in first[-1].samples}
    again = [s for s in records[-1].samples if s["id"] in since]
    assert again, "the test needs a sample that stays"
    assert all(s["entered"] == since[s["id"]] for s in again)
    images = [key for record in records for key in record.images]
    assert len(images) == len(set(images))


@pytest.mark.slow
def test_two_processes_agree_on_what_one_finds(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "failures.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    found: dict[int, list[Any]] = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        finish([sys.executable, script, out, processes], env=environment, timeout=150, cwd=out)
        found[processes] = [torch.load(out / f"{rank}.pt") for rank in range(processes)]
    (alone,), (first, second) = found[1], found[2]
    assert first == second == alone
    assert len(alone) == 6


def test_label_against_prediction_side_by_side(tmp_path: Path) -> None:
    monitor = Watch(method=None, probe=(IMAGES[:8], LABELS[:8]), targets="confused", metrics=True)
    module = Module()
    run = trainer(tmp_path, monitor)
    explanation = monitor.explain(module, (IMAGES[:8], LABELS[:8]))
    with torch.no_grad():
        predicted = module.eval()(IMAGES[:8]).argmax(dim=1)
    expected = []
    for row in range(8):
        expected.append((row, int(LABELS[row])))
        if predicted[row] != LABELS[row]:
            expected.append((row, int(predicted[row])))
    assert 8 < len(expected) < 16
    assert explanation.pairs == expected
    # Only the labels are judged: they stay the same.
    measured = ~explanation.aucs.isnan().any(dim=1)
    assert measured.tolist() == [target == LABELS[row] for row, target in expected]
    run.validate(module, loaders()[1], verbose=False)
    assert list(tmp_path.rglob("heatmaps/*.png"))
    way = monitor._way
    method = way.method_for(softmax)
    scores = {method.activation.activation.score, method.perturbation.score}  # type: ignore[attr-defined]
    assert scores == {contrast(references=1)}


def test_a_number_of_samples_is_not_negative(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="failures=-1 must be a number of samples"):
        trainer(tmp_path, Watch(failures=-1)).validate(Module(), loaders()[1], verbose=False)


def worst_of(logits: Tensor, labels: Tensor, count: int) -> set[int]:
    """Return the samples with the highest cross-entropy."""
    losses = [
        float(-row.log_softmax(dim=0)[label]) for row, label in zip(logits, labels, strict=True)
    ]
    return set(sorted(range(len(losses)), key=lambda i: -losses[i])[:count])


def found_by(monitor: Any, why: str = "highest loss") -> set[int]:
    """Return which samples were chosen for a reason."""
    return {each.place[1] for each in monitor._run.failures.now if each.why == why}


def logits_of(module: Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", module.eval().net(images))


def validate(tmp_path: Path, module: pl.LightningModule, loader: Any, **settings: Any) -> Any:
    """Validate with three failures, and return the monitor."""
    monitor = Watch(failures=3, **settings)
    trainer(tmp_path, monitor).validate(module, loader, verbose=False)
    return monitor


class Copying(Module):
    """Is copied and saved in the middle of its validation step."""

    copies: ClassVar[list[Any]] = []

    def validation_step(self, *arguments: Any) -> Any:
        assert any(m._forward_hooks for m in self.modules())
        if not self.copies:
            file = io.BytesIO()
            torch.save(self, file)
            # It may be read where there is no such package.
            assert b"lightning_aop" not in file.getvalue()
            read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
            self.copies.extend([copy.deepcopy(self), read])
        return super().validation_step(*arguments)


def test_a_module_is_saved_and_copied_while_it_is_listened_to(tmp_path: Path) -> None:
    copies = Copying.copies
    copies.clear()

    class CopyingLater(pl.Callback):
        def on_validation_epoch_end(self, run: pl.Trainer, module: pl.LightningModule) -> None:
            copies.append(copy.deepcopy(module))

    module, monitor = Copying(), Watch(failures=3)
    run = trainer(tmp_path, CopyingLater(), monitor)
    run.validate(module, loaders()[1], verbose=False)
    expected = logits_of(module)
    for each in copies:
        assert torch.equal(logits_of(cast("Module", each)), expected)
    assert found_by(monitor) <= worst_of(expected, LABELS, 3)
    assert not any(m._forward_hooks for m in copies[-1].modules())


class Distilled(Module):
    """Asks a teacher before its own network, in a validation step with a loss of both."""

    def __init__(self, outputs: str = "logits") -> None:
        super().__init__()
        self.outputs = outputs
        torch.manual_seed(7)
        self.teacher: Any = SmallNet()
        self.teacher.head.weight.data *= 20

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        return cast("Tensor", logits.softmax(dim=1) if self.outputs == "probabilities" else logits)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.teacher(batch[0])
        logits = self.net(batch[0])
        logits.detach().mul_(0)  # what is heard is no longer the step's own


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_the_logits_are_those_of_the_network_that_is_explained(
    outputs: str, tmp_path: Path
) -> None:
    module = Distilled(outputs)
    monitor = validate(tmp_path, module, loaders()[1])
    expected = logits_of(module)
    for each in monitor._run.failures.now:
        loss = nn.functional.cross_entropy(expected[each.place[1]], each.label)
        assert each.loss == pytest.approx(float(loss), abs=1e-4)
    teacher = worst_of(module.teacher(IMAGES).detach(), LABELS, 3)
    assert found_by(monitor) <= worst_of(expected, LABELS, 3)
    assert worst_of(expected, LABELS, 3) != teacher


DATA = TensorDataset(IMAGES, LABELS)


class Iterated(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


class Drawing(SequentialSampler):
    """Is called sequential, and is not."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(30).tolist())


@pytest.mark.parametrize(
    ("steady", "settings"),
    [
        (True, {}),
        (True, {"batch_size": None}),
        (True, {"sampler": range(29, -1, -1)}),
        (True, {"batch_sampler": BatchSampler(SequentialSampler(DATA), 7, False)}),
        (True, {"sampler": DistributedSampler(DATA, 2, 0, shuffle=False)}),
        (False, {"sampler": DistributedSampler(DATA, 2, 0)}),
        (False, {"shuffle": True}),
        (False, {"sampler": SubsetRandomSampler(range(30))}),
        (False, {"sampler": WeightedRandomSampler([1.0] * 30, 30)}),
        (False, {"batch_sampler": BatchSampler(RandomSampler(DATA), 7, False)}),
        (False, {"batch_sampler": [[1, 2], [0, 3]]}),
        (False, {"sampler": Drawing(DATA)}),
        (False, {"dataset": Iterated()}),
    ],
)
def test_only_what_keeps_its_order_is_compared_with_before(
    steady: bool, settings: dict[str, Any]
) -> None:
    loader = DataLoader(**({"dataset": DATA} | settings))
    assert is_steady(loader, 0) == steady
    assert is_steady([DataLoader(DATA), loader], 1) == steady
    assert not is_steady([loader], 1)
    assert not is_steady(iter(loader), 0)


def test_what_a_distributed_trainer_makes_of_a_random_sampler_is_not_steady() -> None:
    for sampler in (SubsetRandomSampler(range(30)), WeightedRandomSampler([1.0] * 30, 30)):
        loader = DataLoader(DATA, sampler=DistributedSamplerWrapper(sampler, 2, 0, shuffle=False))
        assert not is_steady(loader, 0)


def test_a_batch_without_a_label_costs_no_other(tmp_path: Path) -> None:
    labels = LABELS.clone()
    labels[7:14] = -100
    labels[20] = -100
    module = Module()
    monitor = validate(tmp_path, module, loaders(labels)[1], probe=(IMAGES[:4], LABELS[:4]))
    kept = [i for i in range(30) if labels[i] >= 0]
    expected = worst_of(logits_of(module)[kept], labels[kept], 3)
    assert found_by(monitor) <= {kept[i] for i in expected}
    assert max(kept[i] for i in expected) > 13, "the test needs a failure after the odd batch"
    with pytest.warns(UserWarning, match="no failures are shown: no label of a batch fits"):
        validate(tmp_path, Module(), loaders(LABELS * 0 - 100)[1], probe=(IMAGES[:4], LABELS[:4]))


class Binary(Module):
    """One logit for two classes."""

    def __init__(self) -> None:
        super().__init__(kind="multilabel")
        self.net.head = nn.Linear(self.net.head.in_features, 1)
        self.net.head.weight.data *= 20

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize("signed", [False, True], ids=["0 and 1", "-1 and 1"])
def test_a_binary_head_with_labels_to_ignore_or_with_signs(signed: bool, tmp_path: Path) -> None:
    module = Binary()
    classes = (LABELS > 2).long()
    labels = 2 * classes - 1 if signed else classes.clone()
    if not signed:
        labels[[8, 20]] = -1
    # Some batches have one class only.
    order = labels.argsort(stable=True) if signed else torch.arange(30)
    probe = (IMAGES[[0, 1, 2, 3, 4, 5]], labels[[0, 1, 2, 3, 4, 5]])
    assert len(set(probe[1].tolist())) == 2
    loader = DataLoader(TensorDataset(IMAGES[order], labels[order]), batch_size=4)
    monitor = validate(tmp_path, module, loader, probe=probe)
    z = logits_of(module, IMAGES[order])[:, 0]
    known = (labels[order] >= 0) | signed
    losses = nn.functional.binary_cross_entropy_with_logits(
        z, classes[order].float(), reduction="none"
    ).where(known, -torch.inf)
    assert found_by(monitor) <= set(losses.topk(3).indices.tolist())
    for each in monitor._run.failures.now:
        assert each.loss == pytest.approx(float(losses[each.place[1]]), abs=1e-4)
        assert int(each.label) == int(classes[order][each.place[1]])


class Samples(Dataset[Any]):
    """What a function makes of each number."""

    classes = ("a", "b", "c", "d", "e")

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class AnyBatch(Module):
    """Validates whatever the batch is."""

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        self(images.float() / 255 if images.dtype == torch.uint8 else images)


class TwoHeads(AnyBatch):
    """Tells a colour and a shape."""

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        return {"shape": -logits, "colour": logits}


BYTES = (IMAGES * 255).round().byte()


@pytest.mark.parametrize(
    ("make", "module", "size"),
    [
        (lambda i: (IMAGES[i], "abcde"[LABELS[i]]), AnyBatch, 7),
        (lambda i: {"image": IMAGES[i], "label": "abcde"[LABELS[i]]}, AnyBatch, 7),
        (lambda i: (IMAGES[i], i, int(LABELS[i])), AnyBatch, 7),
        (lambda i: (IMAGES[i], i, int(LABELS[i])), AnyBatch, 1),
        (lambda i: (IMAGES[i], {"index": i, "label": int(LABELS[i])}), AnyBatch, 7),
        (lambda i: {"image": IMAGES[i], "colour": int(LABELS[i]), "size": 1}, TwoHeads, 7),
        (
            lambda i: {
                "image": IMAGES[i],
                "shape": int(LABELS[i] + 1) % 5,
                "colour": int(LABELS[i]),
            },
            TwoHeads,
            7,
        ),
        (lambda i: (BYTES[i], int(LABELS[i])), AnyBatch, 7),
    ],
    ids=[
        "text",
        "text by key",
        "numbered",
        "one by one",
        "nested",
        "one head",
        "two heads",
        "bytes",
    ],
)
def test_labels_are_read_as_those_of_the_probe(
    make: Any, module: Any, size: int, tmp_path: Path
) -> None:
    model = module()
    monitor = validate(tmp_path, model, DataLoader(Samples(make), batch_size=size), probe=4)
    logits, labels = logits_of(model), LABELS
    if monitor._run.adapter.head == "shape":
        logits, labels = -logits, (LABELS + 1) % 5
    assert found_by(monitor) <= worst_of(logits, labels, 3)
    assert len(monitor._run.failures.now) == 3
    for each in monitor._run.failures.now:
        torch.testing.assert_close(each.image, IMAGES[each.place[1]], atol=2e-3, rtol=0)
        assert int(each.label) == int(labels[each.place[1]])


class ByBreed(AnyBatch):
    """Is trained by one of several columns."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["breed"])


def test_labels_are_what_the_losses_are_given_beside_a_probe_from_elsewhere(tmp_path: Path) -> None:
    def make(i: int) -> Any:
        return {"image": IMAGES[i], "label": int(LABELS[i] + 1) % 5, "breed": int(LABELS[i])}

    model, loader = ByBreed(), DataLoader(Samples(make), batch_size=7)
    monitor = validate(tmp_path, model, loader, probe=(IMAGES[:2], LABELS[:2]))
    assert found_by(monitor) <= worst_of(logits_of(model), LABELS, 3)
    for each in monitor._run.failures.now:
        assert int(each.label) == int(LABELS[each.place[1]])


def test_read_batch_and_several_loaders_of_other_forms(tmp_path: Path) -> None:
    class Either(AnyBatch):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            self(batch[dataloader_idx])

    forms = (lambda i: (IMAGES[i], i, int(LABELS[i])), lambda i: (int(LABELS[i]), IMAGES[i] / 2, i))
    both = [DataLoader(Samples(make), batch_size=7) for make in forms]
    model = Either()
    monitor = validate(tmp_path, model, both, probe=4)
    logits = torch.cat([logits_of(model), logits_of(model, IMAGES / 2)])
    chosen = {30 * each.place[0] + each.place[1] for each in monitor._run.failures.now}
    worst = worst_of(logits, LABELS.repeat(2), 3)
    assert chosen & worst
    read = validate(
        tmp_path, model, both[0], read_batch=lambda batch: (batch[0], (batch[2] + 1) % 5)
    )
    assert found_by(read) <= worst_of(logits[:30], (LABELS + 1) % 5, 3)


def test_they_are_shown_at_the_next_explanation_by_steps(tmp_path: Path) -> None:
    monitor = Watch(failures=3, every_n_epochs=0, every_n_train_steps=2)
    run = trainer(tmp_path, monitor, num_sanity_val_steps=0)
    run.fit(Module(), *loaders())  # three steps an epoch: explanations after 2, 4, 6 and 8
    folder = Path(run.logger.log_dir) / "explanations"  # type: ignore[union-attr, arg-type]
    # Those of a validation once.
    assert [record.step for record in History.load(folder).failures] == [3, 7]


def test_images_of_another_size_than_the_probe_s(tmp_path: Path) -> None:
    module = Module()
    monitor = validate(tmp_path, module, loaders()[1], probe=(torch.rand(4, 3, 32, 32), LABELS[:4]))
    assert found_by(monitor) <= worst_of(logits_of(module), LABELS, 3)
    assert len(monitor._run.failures.now) == 3
    large = DataLoader(TensorDataset(torch.rand(10, 3, 32, 32), LABELS[:10]), batch_size=5)
    with pytest.warns(UserWarning, match="images of 32 x 32 are not among the failures, which are"):
        monitor = validate(tmp_path, module, [loaders()[1], large])
    assert {each.place[0] for each in monitor._run.failures.now} == {0}


def test_a_segmentation_and_values_have_no_failures_and_it_is_said(tmp_path: Path) -> None:
    class Segmenting(AnyBatch):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 4, 3, padding=1)

    masks = torch.randint(0, 4, (30, 24, 24), generator=GENERATOR)
    with pytest.warns(
        UserWarning, match="no failures are shown: the labels are a class for each p"
    ):
        monitor = validate(tmp_path, Segmenting(), loaders(masks)[1], metrics=False)
    assert monitor._run.failures.now == []

    class Value(Binary):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.mse_loss(logits[:, 0], labels)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.mse_loss(self(batch[0])[:, 0], batch[1])

    with pytest.warns(UserWarning, match="no failures are shown: the model predicts values"):
        validate(tmp_path, Value(), loaders(torch.rand(30))[1])


def test_what_they_take_is_told_beforehand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_aop.monitor.progress._DELAY", 0.0)
    module = Module()
    with caplog.at_level("INFO"):
        monitor = validate(tmp_path, module, loaders()[1], metrics=False, controls=False, probe=4)
    predicted = logits_of(module).argmax(dim=1)
    assert all(predicted[f.place[1]] != f.label for f in monitor._run.failures.now)
    # Watch explains by GradCAM: forward and backward. And the logits of the three failures.
    assert (
        f"explaining 7 images takes about 0 s, for {4 * 2 + 3 * (1 + 2 * 2)} model" in caplog.text
    )
