"""Errors that the user can fix are told from bugs by their class."""

import ast
import pickle
from pathlib import Path

import pytest

import lightning_aop
from lightning_aop import AOP, GradCAM, RankedMask
from lightning_aop.coco import ImageError
from lightning_aop.errors import (
    ExistingFileError,
    FileError,
    InvalidTypeError,
    InvalidValueError,
    MissingFileError,
    MissingPackageError,
    NonFiniteScoreError,
    UserError,
    did_you_mean,
)
from lightning_aop.model import TargetLayerError

BUILT_IN: dict[type[UserError], type[Exception]] = {
    InvalidValueError: ValueError,
    NonFiniteScoreError: ValueError,
    TargetLayerError: ValueError,
    InvalidTypeError: TypeError,
    FileError: OSError,
    ImageError: OSError,
    MissingFileError: FileNotFoundError,
    ExistingFileError: FileExistsError,
    MissingPackageError: ImportError,
}
ROOT = Path(lightning_aop.__file__).parent


@pytest.mark.parametrize("error", BUILT_IN)
def test_they_are_the_built_in_errors_too(error: type[UserError]) -> None:
    made = error("what is wrong")
    assert isinstance(made, UserError)
    assert isinstance(made, BUILT_IN[error])
    assert str(made) == "what is wrong"
    again = pickle.loads(pickle.dumps(made))  # processes send them to each other
    assert type(again) is error
    assert str(again) == str(made)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_the_package_raises_on_purpose_is_a_user_error(path: Path) -> None:
    """A built-in class means a bug: the command line shows its traceback."""
    names = {error.__name__ for error in BUILT_IN.values()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert getattr(node.exc.func, "id", None) not in names, f"{path}:{node.lineno}"


def test_a_caller_catches_what_it_always_caught() -> None:
    with pytest.raises(ValueError, match=r"AOP: threshold must lie in \[0, 1\]"):
        AOP(GradCAM(), RankedMask(), threshold=2)


def test_the_nearest_names() -> None:
    known = ["gradcam", "gradcam++", "hirescam", "lime", "XRAI"]
    assert did_you_mean("gradcan", known) == "; did you mean gradcam or gradcam++?"
    assert did_you_mean("xria", known) == "; did you mean XRAI?"
    assert did_you_mean("pineapple", known) == ""
