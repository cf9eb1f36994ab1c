"""The public names with their arguments and defaults, beside those that were promised.

After a change that is meant: `python tests/test_api.py > tests/api.txt`, and say it in CHANGELOG.md.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, get_origin

PROMISED = Path(__file__).with_name("api.txt")
MODULES = (
    "lightning_aop",
    "lightning_aop.metrics",
    "lightning_aop.scores",
    "lightning_aop.ops",
    "lightning_aop.types",
    "lightning_aop.methods",
    "lightning_aop.model",
    "lightning_aop.metrics.randomization",
    "lightning_aop.metrics.similarity",
    "lightning_aop.history",
    "lightning_aop.monitor.loggers",
    "lightning_aop.view",
    "lightning_aop.coco",
)


def called(function: Any) -> str:
    """Return the arguments with their defaults; annotations are read differently by each Python."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if inspect.isfunction(default):
            parameter = parameter.replace(default=Name(default.__name__))
        elif type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            parameter = parameter.replace(default=Name("..."))
        parameters.append(parameter.replace(annotation=parameter.empty))
    return str(inspect.Signature(parameters))


class Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def methods(cls: type) -> Iterator[str]:
    """Return a line for each public method that is the package's own, inherited or not."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("lightning_aop"):
            found |= vars(base)
    for name, value in sorted(found.items()):
        if isinstance(value, FunctionType) and not name.startswith("_") and name != "score":
            yield f"    {name}{called(value)}"


def lines() -> Iterator[str]:
    for place in MODULES:
        yield ""
        yield f"# {place}"
        module = importlib.import_module(place)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            # Python 3.10 takes an alias such as Callable[[int], int] for a class.
            if inspect.isclass(value) and get_origin(value) is None:
                plain = getattr(value, "_is_protocol", False) or issubclass(value, Exception)
                yield f"class {name}" if plain else f"class {name}{called(value)}"
                yield from methods(value)
            elif isinstance(value, FunctionType):
                yield f"{name}{called(value)}"
            else:
                yield name


def test_the_public_names_and_arguments_are_those_that_were_promised() -> None:
    promised, found = PROMISED.read_text().splitlines(), list(lines())
    changed = "\n".join(difflib.unified_diff(promised, found, "promised", "found", lineterm=""))
    assert not changed, f"{changed}\n\nIf this is meant: {__doc__}"


if __name__ == "__main__":
    print("\n".join(lines()))
