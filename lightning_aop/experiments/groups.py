"""A data set in fixed groups, which processes share out and a stopped run needs no second time.

A group is worked on as a whole, by whichever process gets it, and its results are kept under its number.
So they don't depend on the number of processes, or on how often the run was stopped.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from torch.utils.data import DataLoader, Dataset

Batch = TypeVar("Batch")
Group: TypeAlias = tuple[int, range]
"""The number of a group, and the samples that it is made of."""

NOTHING = -1
"""The number of a group without samples."""


def in_groups(count: int, size: int) -> list[Group]:
    """Cut `count` samples into groups of `size`; the last may be smaller."""
    starts = range(0, count, size)
    return [(number, range(i, min(i + size, count))) for number, i in enumerate(starts)]


def unfinished(groups: Sequence[Group], done: Container[int], processes: int) -> list[Group]:
    """Return the groups that are not done, filled up to one for each process; none if all are.

    Lightning doesn't run a process that has nothing to do.
    """
    missing = [group for group in groups if group[0] not in done]
    return missing + [(NOTHING, range(0))] * (processes - len(missing)) if missing else []


def group_loader(
    groups: Sequence[Group], read: Callable[[Group], Batch], num_workers: int = 0
) -> DataLoader[Batch]:
    """Return a loader whose batches are what `read` makes of each group."""
    return DataLoader(
        _Groups(groups, read), batch_size=1, collate_fn=_only, num_workers=num_workers
    )


class _Groups(Dataset[Batch], Generic[Batch]):
    def __init__(self, groups: Sequence[Group], read: Callable[[Group], Batch]) -> None:
        self.groups, self.read = groups, read

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        return self.read(self.groups[index])


def _only(batch: list[Any]) -> Any:
    return batch[0]
