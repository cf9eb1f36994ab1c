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
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import RandomSampler

from lightning_aop.history.failures import FailureRecord, url_of
from lightning_aop.history.store import stored
from lightning_aop.model.adapter import Adapter
from lightning_aop.model.listening import Listener
from lightning_aop.model.outputs import sums_to_one
from lightning_aop.monitor.explanation import Explanation, Moment
from lightning_aop.monitor.labels import Reading, fit_labels
from lightning_aop.monitor.probe import Probe
from lightning_aop.monitor.processes import Processes
from lightning_aop.scores import sigmoid, value
from lightning_aop.view.heat import displayable

__all__ = ["Failure", "Failures", "Place"]

Place = tuple[int, int]
"""A sample's loader, and its number in there."""

_KINDS = ("highest loss", "newly wrong", "sure but wrong")


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


class Failures:
    """The worst samples of each validation, and when each came and went.

    In turns the one with the highest loss, the one with the highest loss of those that the validation
    before had right, and the one that is wrong with the most confidence, until there are `count`.

    Attributes:
        count: how many.
        now: the worst of the last validation.
        entered: when each of them came, by what tells the images apart.
        left: those that went since they were last recorded.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.now: list[Failure] = []
        self.entered: dict[str, str] = {}
        self.left: list[dict[str, Any]] = []
        self._size: tuple[int, ...] = ()  # of images that can be explained together
        self._adapter: Adapter | None = None
        self._listener: Listener | None = None
        self._right: set[Place] = set()
        self._right_now: set[Place] = set()
        self._counted: dict[int, int] = {}
        self._found: dict[str, list[tuple[float, Failure]]] = {}
        self._unheard = False

    def begin(self, adapter: Adapter, module: nn.Module, size: Sequence[int]) -> None:
        """Listen to a validation."""
        if adapter is not self._adapter:
            self.stop()
            self._adapter, self._listener = adapter, None
            if adapter.read is not None and adapter.score is not value:
                self._listener = Listener(adapter.read, adapter.classes)
        self._size = tuple(size)
        self._right_now, self._counted, self._unheard = set(), {}, False
        self._found = {kind: [] for kind in _KINDS}
        if self._listener is not None:
            self._listener.start(module)

    def stop(self) -> None:
        """Listen no longer."""
        if self._listener is not None:
            self._listener.stop()

    @torch.no_grad()
    def see(
        self, reading: Reading, outputs: Any, loader: int, processes: Processes, steady: bool
    ) -> None:
        """Take in a batch that has just gone through.

        Args:
            reading: its images and labels.
            outputs: what the validation step has returned.
            loader: which of several it is of.
            processes: who goes through the data together.
            steady: a sample has the same number at each validation.
        """
        images, adapter = reading.inputs.images, self._adapter
        first = self._counted.get(loader, 0)
        self._counted[loader] = first + len(images)
        if adapter is None or self._listener is None:
            return
        heard = self._listener.take(len(images), outputs)
        fitted = fit_labels(reading.labels, adapter)
        if heard is None or fitted is None:
            self._unheard = True
            return
        if tuple(images.shape[1:]) != self._size:
            return
        losses, wrong, confidence = _judged(heard.float().cpu(), fitted.labels, adapter)
        numbers = range(first, first + len(images))
        # As the sampler deals the samples out.
        places = [(loader, number * processes.size + processes.rank) for number in numbers]
        right = {
            place for place, is_wrong in zip(places, wrong.tolist(), strict=True) if not is_wrong
        }
        newly = torch.zeros_like(wrong)
        if steady:
            self._right_now |= right
            newly = torch.tensor([place in self._right for place in places]) & wrong
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
                    image = images[row].detach().cpu().clone()
                    label = fitted.labels[row].clone()
                    candidates[row] = Failure(places[row], image, label, float(losses[row]))
                kept.append((worth, candidates[row]))
            kept.sort(key=lambda pair: -pair[0])
            del kept[self.count :]

    def choose(self, title: str, processes: Processes) -> str | None:
        """Choose the worst of the validation that is over, the same on every process.

        Returns:
            What is wrong where no logits were heard, in words.
        """
        self.stop()
        found = {
            kind: sorted(
                (pair for each in processes.all(self._found.get(kind, [])) for pair in each),
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
        self.now = list(now.values())
        self.entered = {key: each.entered for key, each in now.items()}
        self._right = set().union(*processes.all(self._right_now))
        self._found = {}
        unheard = processes.any(self._unheard or self._listener is None)
        if self.now or not unheard:
            return None
        return (
            "no failures are shown: the validation step computes no logits that can be heard beside "
            "labels. Let it call the module or its network, or return the logits"
        )

    @property
    def probe(self) -> Probe:
        """The samples, as images to explain."""
        images = torch.stack([each.image for each in self.now])
        return Probe(images, torch.stack([each.label for each in self.now]))

    @property
    def headings(self) -> list[str]:
        """What to say of each sample: why it is one, and since when."""
        return [f"{each.why}\nsince {each.entered}".replace(" · ", "\n") for each in self.now]

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


def _judged(
    logits: Float[Tensor, "b k"], labels: Num[Tensor, "b *k"], adapter: Adapter
) -> tuple[Float[Tensor, " b"], Tensor, Float[Tensor, " b"]]:
    """Return the loss of each sample, whether it is wrong, and how sure the model is of what is wrong.

    Samples without a label have a loss of −∞, and count as right.
    """
    if adapter.score is sigmoid or labels.ndim == 2:
        truth = (
            labels.float()
            if labels.ndim == 2
            else nn.functional.one_hot(labels, logits.shape[1]).float()
        )
        losses = binary_cross_entropy_with_logits(logits, truth.clamp(0, 1), reduction="none").mean(
            dim=1
        )
        chances = logits.sigmoid()
        mistaken = (chances > 0.5) != (truth > 0.5)
        certainty = torch.where(chances > 0.5, chances, 1 - chances)
        known, wrong = (truth >= 0).all(dim=1), mistaken.any(dim=1)
        confidence = certainty.where(mistaken, 0.0).amax(dim=1)
    else:
        if sums_to_one(logits) and bool((logits >= 0).all()):  # probabilities
            logits = logits.clamp_min(1e-12).log()
        known = labels >= 0
        losses = cross_entropy(logits, labels.clamp_min(0), reduction="none")
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        wrong = predicted != labels
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
    """Tell whether one of the loaders gives its samples in the same order each time, as it says."""
    loaders = getattr(loaders, "iterables", loaders)
    parts = (
        [*(loaders.values() if isinstance(loaders, Mapping) else loaders)]
        if isinstance(loaders, (list, tuple, Mapping))
        else [loaders]
    )
    sampler = getattr(parts[index], "sampler", None) if index < len(parts) else None
    return not isinstance(sampler, RandomSampler) and not getattr(sampler, "shuffle", False)
