"""The samples that a model fails at, found while the user's own validation runs.

Nothing is evaluated for it: the logits are those that the validation step computes itself.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from lightning_aop.history.failures import FailureRecord, url_of
from lightning_aop.history.store import stored
from lightning_aop.model.adapter import Adapter
from lightning_aop.model.batches import BatchError
from lightning_aop.model.listening import Listener
from lightning_aop.monitor.explanation import Explanation, Moment
from lightning_aop.monitor.labels import (
    Labels,
    Layout,
    Parts,
    ReadBatch,
    Reading,
    fit_labels,
    parts_by,
    read_batch,
)
from lightning_aop.monitor.probe import Probe
from lightning_aop.monitor.processes import Processes
from lightning_aop.scores import sigmoid, value
from lightning_aop.view.heat import displayable

__all__ = ["Failure", "Failures", "Place"]

Place = tuple[int, int]
"""A sample's loader, and its number in there."""

_UNHEARD = (
    "the validation step computes no logits that can be heard beside labels. Let it call the module or "
    "its network, or return the logits"
)
_OF_PIXELS = (
    "the labels are a class for each pixel, and whether a segmentation is wrong can't be told from the "
    "classes of the image: set failures=0"
)
_OF_VALUES = "the model predicts values, and nothing says how far off is wrong: set failures=0"
_KINDS = ("highest loss", "newly wrong", "wrongly sure")


@dataclass(frozen=True)
class Failure:
    """A sample of the validation, and what the model said of it there.

    Attributes:
        place: where it is.
        image: as the model takes it.
        label: its class, or [K] multi-hot.
        loss: its cross-entropy.
        why: the reason that it was chosen for.
        entered: the title of the validation at which it came; empty as long as it is none.
    """

    place: Place
    image: Float[Tensor, "c h w"] = field(repr=False)
    label: Num[Tensor, "*k"]
    loss: float
    why: str = ""
    entered: str = ""

    @property
    def key(self) -> str:
        """What tells the image from others, also where a loader shuffles."""
        content = self.image.float().contiguous().numpy().tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclass
class _Batch:
    """A batch that has gone through, before anything waits for its values."""

    parts: Parts
    logits: Tensor | None
    places: list[Place]
    steady: bool
    ready: Any = None


class Failures:
    """The worst samples of each validation, and when each came and went.

    In turns the one with the highest loss, the one with the highest loss of those that the validation
    before had right, and the one that is wrong with the most confidence, until there are `count`.

    On an accelerator a batch is judged when the next one has been handed to it, so that nothing waits
    for the device.

    Attributes:
        count: how many.
        now: the worst of the last validation.
        fresh: they have not been explained yet.
        entered: when each of them came, by what tells the images apart.
        left: those that went since they were last recorded.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.now: list[Failure] = []
        self.fresh = False
        self.entered: dict[str, str] = {}
        self.left: list[dict[str, Any]] = []
        self._adapter: Adapter | None = None
        self._module: nn.Module | None = None
        self._listener: Listener | None = None
        self._known: Labels | None = None  # of the probe
        self._layout: Layout | None = None  # of its batch
        self._names: Sequence[str] | None = None
        self._layouts: dict[int, Layout] = {}
        self._right: set[Place] = set()
        self._forget()

    def _forget(self) -> None:
        """Forget what the last validation has found, but for what it had right."""
        self._size: tuple[int, ...] = ()  # of images that can be explained together
        self._right_now: set[Place] = set()
        self._counted: dict[int, int] = {}
        self._found: dict[str, list[tuple[float, Failure]]] = {kind: [] for kind in _KINDS}
        self._waiting: _Batch | None = None
        self._odd: set[int] = set()  # loaders of which it is not known how many samples went by
        self._troubles: dict[str, bool] = {}  # and whether it is said beside failures, too

    def begin(
        self,
        adapter: Adapter,
        module: nn.Module,
        reading: Reading | None,
        names: Sequence[str] | None,
    ) -> None:
        """Begin with a validation.

        Args:
            adapter: the way from the module to logits.
            module: the user's.
            reading: that of the probe, where it was read from this data.
            names: of the classes, for labels that are text.
        """
        self.end()
        self._forget()
        self._module = module
        if adapter is not self._adapter:
            self._adapter, self._listener = adapter, None
            if adapter.score is not value:
                self._listener = Listener(adapter.sources, adapter.classes)
            self._layouts = {}
        self._names, self._known, self._layout = names, None, None
        if reading is not None:
            self._known = reading.labels_for(adapter)
            self._layout = Layout.of(reading, adapter) if _tells(reading) else None
        if self._known is not None and self._known.kind == "mask":
            self._listener = None
            self._troubles[_OF_PIXELS] = False
        if self._listener is not None:
            self._listener.begin(module)
        elif adapter.score is value:
            self._troubles[_OF_VALUES] = False

    def listen(self) -> None:
        """Listen to the batch that comes."""
        if self._listener is not None:
            self._listener.start()

    def stop(self) -> None:
        """Listen no longer to a batch."""
        if self._listener is not None:
            self._listener.stop()

    def end(self) -> None:
        """Let go of the module, and of the last batch."""
        self._waiting = self._module = None
        if self._listener is not None:
            self._listener.end()

    @torch.no_grad()
    def see(
        self,
        batch: Any,
        outputs: Any,
        loader: int,
        processes: Processes,
        steady: bool,
        read: ReadBatch | None = None,
    ) -> None:
        """Take in a batch that has just gone through.

        Args:
            batch: as the loader gives it.
            outputs: what the validation step has returned.
            loader: which of several it is of.
            processes: who goes through the data together.
            steady: a sample has the same number at each validation.
            read: the user's own way to images and labels.
        """
        if self._listener is None:
            return
        try:
            parts = self._parts(batch, loader, read)
        except BatchError as error:
            self._odd.add(loader)
            self._troubles[f"of a batch nothing can be read: {error}"] = False
            self.stop()
            return
        first, count = self._counted.get(loader, 0), len(parts.images)
        self._counted[loader] = first + count
        # As the sampler deals the samples out.
        numbers = range(first, first + count)
        places = [(loader, number * processes.size + processes.rank) for number in numbers]
        logits = self._listener.take(count, outputs)
        seen = _Batch(parts, logits, places, steady and loader not in self._odd)
        before, self._waiting = self._waiting, None
        if logits is not None and logits.device.type == "cuda":
            seen.logits = logits.to("cpu", non_blocking=True)
            if isinstance(parts.labels, Tensor):
                seen.parts = replace(parts, labels=parts.labels.to("cpu", non_blocking=True))
            seen.ready = torch.cuda.current_stream(logits.device).record_event()
            self._waiting = seen
        else:
            self._judge(seen)
        if before is not None:
            self._judge(before)

    def _parts(self, batch: Any, loader: int, read: ReadBatch | None) -> Parts:
        """Return images and labels, from where they are in other batches of the loader."""
        if read is not None:
            found = parts_by(read, batch)
            if found is None:
                raise BatchError("read_batch returned no images")
            return found
        for layout in (self._layouts.get(loader), self._layout):
            if layout is not None and (found := layout.parts(batch)) is not None:
                return found
        reading = read_batch(batch, None, None, self._names)
        if self._module is not None:
            reading = reading.used_by(self._module)
        layout = Layout.of(reading, self._adapter)
        if _tells(reading):
            self._layouts[loader] = layout
        found = layout.parts(batch)
        assert found is not None
        return found

    def _judge(self, batch: _Batch) -> None:
        """Keep the worst samples of a batch."""
        if batch.ready is not None:
            batch.ready.synchronize()
        adapter, labels = self._adapter, batch.parts.read(self._names)
        assert adapter is not None
        if batch.logits is None or labels is None:
            self._troubles[_UNHEARD] = False
            return
        if labels.kind == "mask":
            self._troubles[_OF_PIXELS] = False
            return
        try:
            fitted = fit_labels(labels, adapter, self._known)
        except BatchError as error:  # such as one whose labels are all to be ignored
            self._troubles[f"no label of a batch fits: {error}"] = False
            return
        assert fitted is not None
        losses, wrong, confidence = _judged(batch.logits.float().cpu(), fitted.labels, adapter)
        newly = torch.zeros_like(wrong)
        if batch.steady:
            right = (~wrong).tolist()
            self._right_now |= {
                p for p, is_right in zip(batch.places, right, strict=True) if is_right
            }
            newly = torch.tensor([place in self._right for place in batch.places]) & wrong
        images, form = batch.parts.images, batch.parts.form
        size = tuple(form.inside(images[:1]).shape[1:])
        self._size = self._size or size
        if size != self._size:
            self._troubles[
                f"images of {size[1]} x {size[2]} are not among the failures, which are of one size, "
                f"{self._size[1]} x {self._size[2]}"
            ] = True
            return
        candidates: dict[int, Failure] = {}
        values = (losses, losses.where(newly, -torch.inf), confidence.where(wrong, -torch.inf))
        for kind, each in zip(_KINDS, values, strict=True):
            kept = self._found[kind]
            least = kept[-1][0] if len(kept) == self.count else -torch.inf
            best = each.topk(min(self.count, len(each)))
            for worth, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if not worth > least:
                    break
                if row not in candidates:
                    image = form.inside(images[row : row + 1])[0].detach().as_subclass(Tensor)
                    # From a GPU it is not waited for until all is over.
                    image = image.to("cpu", non_blocking=image.is_cuda, copy=True)
                    candidates[row] = Failure(
                        batch.places[row], image, fitted.labels[row].clone(), float(losses[row])
                    )
                kept.append((worth, candidates[row]))
            kept.sort(key=lambda pair: -pair[0])
            del kept[self.count :]

    def choose(self, title: str, processes: Processes) -> list[str]:
        """Choose the worst of the validation that is over, the same on every process.

        Returns:
            What is wrong, in words.
        """
        if self._waiting is not None:
            try:
                self._judge(self._waiting)
            except Exception as error:  # the other processes wait for what this one has found
                self._troubles[f"the last batch could not be judged: {error}"] = False
        self.end()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # images may be on their way
        shares = processes.all((self._found, self._right_now, self._size, self._troubles))
        size = next((size for _, _, size, _ in shares if size), ())
        found = {
            kind: sorted(
                (
                    pair
                    for share, *_ in shares
                    for pair in share[kind]
                    if tuple(pair[1].image.shape) == size
                ),
                key=lambda pair: (-pair[0], pair[1].place),
            )
            for kind in _KINDS
        }
        now: dict[str, Failure] = {}
        for why, failure in _in_turns(found):
            if len(now) < self.count and failure.key not in now:
                entered = self.entered.get(failure.key, title)
                now[failure.key] = replace(failure, why=why, entered=entered)
        self.left += [
            {"id": key, "entered": entered, "left": title}
            for key, entered in self.entered.items()
            if key not in now
        ]
        self.now, self.fresh = list(now.values()), bool(now)
        self.entered = {key: each.entered for key, each in now.items()}
        self._right = set().union(*(right for _, right, _, _ in shares))
        troubles = {text: beside for *_, own in shares for text, beside in own.items()}
        self._forget()
        if self.now or not troubles:
            return [text for text, beside in troubles.items() if beside]
        return [f"no failures are shown: {next(iter(troubles))}"]

    @property
    def probe(self) -> Probe:
        """The samples, as images to explain."""
        images = torch.stack([each.image for each in self.now])
        return Probe(images, torch.stack([each.label for each in self.now]))

    @property
    def headings(self) -> list[str]:
        """What to say of each sample: why it is one, and since when, in lines as short as a panel."""
        return [f"{each.why}\nsince\n{each.entered.split(' · ')[-1]}" for each in self.now]

    def record(self, explanation: Explanation, moment: Moment) -> FailureRecord:
        """Return what is stored of them; who has left is told once."""
        maps, look = stored(explanation.maps).numpy(), explanation.look
        shown = (displayable(explanation.probe.images, look.mean, look.std) * 255).round().byte()
        pictures = shown.permute(0, 2, 3, 1).cpu().numpy()
        samples = []
        for row, each in enumerate(self.now):
            own = (explanation.rows == row).nonzero()[:, 0].tolist()
            samples.append(
                {
                    "id": each.key,
                    "loader": each.place[0],
                    "index": each.place[1],
                    "why": each.why,
                    "loss": round(each.loss, 4),
                    "labels": explanation.probe.classes_of(row),
                    "predicted": int(explanation.predicted[own[0]]) if own else None,
                    "entered": each.entered,
                    "targets": explanation.targets[own].tolist(),
                    "scores": [round(s, 4) for s in explanation.scores[own].nan_to_num(0).tolist()],
                    "maps": [url_of(maps[n]) for n in own],
                }
            )
        left, self.left = self.left, []
        images = {each.key: url_of(pictures[row]) for row, each in enumerate(self.now)}
        return FailureRecord(moment.step, moment.epoch, moment.title, samples, left, images)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: who is here since when."""
        return {"failures_entered": self.entered, "failures_left": self.left}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.entered = dict(state.get("failures_entered", {}))
        self.left = list(state.get("failures_left", []))


def _tells(reading: Reading) -> bool:
    """Tell whether there are enough samples to tell labels from running numbers."""
    return len(reading.inputs.images) > 2


def _judged(
    logits: Float[Tensor, "b k"], labels: Num[Tensor, "b *k"], adapter: Adapter
) -> tuple[Float[Tensor, " b"], Tensor, Float[Tensor, " b"]]:
    """Return the loss of each sample, whether it is wrong, and how sure the model is of what is wrong.

    Samples without a label have a loss of −∞, and count as right.
    """
    several = labels.ndim == 2
    known = (labels >= 0).all(dim=1) if several else labels >= 0
    labels = labels.clamp_min(0)
    if adapter.score is sigmoid:
        truth = (labels if several else one_hot(labels, logits.shape[1])).float()
        losses = binary_cross_entropy_with_logits(logits, truth.clamp(0, 1), reduction="none")
        losses = losses.mean(dim=1)
        chances = logits.sigmoid()
        mistaken = (chances > 0.5) != (truth > 0.5)
        certainty = torch.where(chances > 0.5, chances, 1 - chances)
        wrong = mistaken.any(dim=1)
        confidence = certainty.where(mistaken, 0.0).amax(dim=1)
    else:
        logs = logits.log_softmax(dim=1)
        highest, predicted = logs.max(dim=1, keepdim=True)
        confidence = highest[:, 0].exp()
        if several:  # in equal parts, or as they are shared
            truth = labels / labels.sum(dim=1, keepdim=True)
            losses = -(truth * logs.clamp_min(-1e4)).sum(dim=1)
            wrong = labels.gather(1, predicted)[:, 0] <= 0.5
        else:
            losses = -logs.gather(1, labels[:, None])[:, 0]
            wrong = predicted[:, 0] != labels
    known &= losses.isfinite()
    return losses.where(known, -torch.inf), wrong & known, confidence


def _in_turns(
    found: dict[str, list[tuple[float, Failure]]],
) -> Iterable[tuple[str, Failure]]:
    """Yield the first of each kind, then the second, and so on."""
    for rank in range(max((len(each) for each in found.values()), default=0)):
        for kind, each in found.items():
            if rank < len(each):
                yield kind, each[rank][1]


def is_steady(loaders: Any, index: int) -> bool:
    """Tell whether one of the loaders is known to give its samples in the same order each time."""
    loaders = getattr(loaders, "iterables", loaders)
    parts = (
        [*(loaders.values() if isinstance(loaders, Mapping) else loaders)]
        if isinstance(loaders, (list, tuple, Mapping))
        else [loaders]
    )
    loader = parts[index] if index < len(parts) else None
    sampler = getattr(loader, "sampler", None)
    if (batches := getattr(loader, "batch_sampler", None)) is not None:
        if type(batches) is not BatchSampler:
            return False
        sampler = batches.sampler
    # Not of a class below: it may draw.
    if type(sampler) is DistributedSampler:
        return not sampler.shuffle
    return type(sampler) in (SequentialSampler, range, list, tuple)
