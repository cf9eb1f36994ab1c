"""How the package is laid out: imports run downwards, and one folder touches the user's models."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_aop"

# From the bottom to the top; what stands in one row may not import each other, but for itself.
FLOORS = (
    {"_version", "errors", "tables"},
    {"types", "files"},
    {"checks", "scores"},
    {"ops"},
    {"model"},
    {"methods", "metrics", "view", "data"},
    {"history", "coco"},
    {"monitor"},
    {"_public"},
    {"experiments"},
    {"cli"},
    {"__main__"},
)
# What changes a module, or the random state, for others.
TOUCHES = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "set_rng_state",
    "setstate",
    "set_state",
    "eval",
    "train",
}
SEEDS = {"random.seed", "np.random.seed", "torch.manual_seed", "torch.cuda.manual_seed"}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """Return the name of the part of the package that a file belongs to, and its content."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Return which parts of the package a file imports, also inside functions."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
            if node.module == "lightning_aop":
                names = [f"lightning_aop.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("lightning_aop"):
                yield name.split(".")[1] if "." in name else ""


def test_imports_run_downwards() -> None:
    floor = {part: number for number, row in enumerate(FLOORS) for part in row}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other or 'the root'}"
        for part, path, tree in sources()
        for other in set(imported(tree)) - {part}
        if floor.get(other, 99) >= floor[part]
    ]
    assert wrong == []


def test_every_part_has_its_floor() -> None:
    parts = {part for part, _, _ in sources()}
    assert parts == set().union(*FLOORS)


# Modules of its own: a command's network, a LightningModule's backbone.
OWN = {"cli", "coco", "data"}


def test_only_model_touches_hooks_modes_and_random_state() -> None:
    found = set()
    for part, path, tree in sources():
        if part == "model" or part in OWN:
            continue
        for node in ast.walk(tree):
            calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if calls and (node.func.attr in TOUCHES or ast.unparse(node.func) in SEEDS):
                found.add(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)[:90]}")
            stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stores and node.attr in ("training", "requires_grad"):
                found.add(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)} = …")
    assert found == set()
