"""See, while a model trains in PyTorch Lightning, what it looks at and whether that can be trusted."""

from typing import TYPE_CHECKING, Any

from lightning_aop._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_aop._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public names when the first is asked for; `lightning-aop --help` does without torch."""
    if name == "__all__" or not name.startswith("_"):
        from lightning_aop import _public

        for place in (vars(_public), globals()):  # the second for modules, which are there by now
            if name in place:
                return place[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
