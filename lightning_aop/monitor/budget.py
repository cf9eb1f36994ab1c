"""How much of the training time explanations may take."""

import time
from dataclasses import dataclass, field

_FREE = 60.0  # seconds


@dataclass
class Budget:
    """Time spent on explanations beside the time spent on training, from now on.

    A share of the training time says little before there was much of it: the first minute of
    explanations is free.

    Attributes:
        share: explanations may take this share of the training time; None for any.
        spent: seconds spent on explanations.
        last: seconds that the last explanation took, but for extras, and the next is expected to take.
        skipped: explanations left out since the last.
        left_out: explanations left out in all.
    """

    share: float | None = None
    spent: float = 0.0
    last: float = 0.0
    skipped: int = 0
    left_out: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def training(self) -> float:
        """Seconds since the start, without explanations."""
        return time.perf_counter() - self.started - self.spent

    @property
    def overhead(self) -> float:
        """The share that explanations have taken so far."""
        return self.spent / max(self.training, 1e-9)

    def allows_another(self, extra: float = 0.0) -> bool:
        """Tell whether one more may be made; the first always, since nobody knows what it takes.

        `extra` are the seconds expected for what not every explanation has.
        """
        if self.share is None or self.last == 0:
            return True
        allowed = max(self.share * self.training, _FREE)
        return self.spent + self.last + extra <= allowed

    def skip(self) -> None:
        """Take an explanation into account that is left out."""
        self.skipped += 1
        self.left_out += 1

    def pay(self, seconds: float, extra: float = 0.0) -> None:
        """Take an explanation into account, of which `extra` seconds were for extras."""
        self.spent += seconds
        self.last = seconds - extra
        self.skipped = 0
