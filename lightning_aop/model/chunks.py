"""How many images a method takes through the model in one pass, found and set by its fields."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


def largest_chunk(method: object) -> int | None:
    """Return the largest `eval_batch_size` of a method and its stages, None if it has none."""
    sizes = [value for value in _sizes(method) if isinstance(value, int)]
    return max(sizes, default=None)


def with_chunk(method: T, largest: int) -> T:
    """Return the method, or a copy with no `eval_batch_size` above `largest`."""
    if not is_dataclass(method) or isinstance(method, type):
        return method
    changes: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "eval_batch_size" and value > largest:
            changes[field.name] = largest
        elif (smaller := with_chunk(value, largest)) is not value:
            changes[field.name] = smaller
    return replace(method, **changes) if changes else method


def _sizes(method: object) -> list[object]:
    if not is_dataclass(method) or isinstance(method, type):
        return []
    found: list[object] = []
    for field in fields(method):
        value = getattr(method, field.name)
        found += [value] if field.name == "eval_batch_size" else _sizes(value)
    return found
