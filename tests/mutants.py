"""Mutation testing by cosmic-ray's operators: change the maths a little, and see whether a test notices.

    make mutants                                  # all four modules, an hour or two on one core
    python tests/mutants.py ops --sample 50       # a random part of one

Each mutant runs the tests of its module, and those of the public signatures, until the first that
fails, in a process of its own that is forked after torch has been imported. A change that leaves the
program the same but for annotations is no mutant.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray import mutating, plugins

ROOT = Path(__file__).parents[1]
MODULES = {
    "ops": ("lightning_aop.ops", ["test_ops.py"]),
    "functional": ("lightning_aop.metrics.functional", ["metrics/test_metrics.py"]),
    "emp": ("lightning_aop.methods.emp", ["methods/test_perturbation.py"]),
    "igos": ("lightning_aop.methods.igos", ["methods/test_perturbation.py"]),
    "ranked_mask": ("lightning_aop.methods.ranked_mask", ["methods/test_perturbation.py"]),
    "cam": ("lightning_aop.methods.cam", ["methods/test_cam.py"]),
}
# One or two replacements each: more of the same find nothing new.
OPERATORS = [
    "core/AddNot",
    "core/NumberReplacer",
    "core/ReplaceAndWithOr",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    *(
        f"core/ReplaceBinaryOperator_{pair}"
        for pair in (
            *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_Mul", "Pow_Mul"),
            *("BitAnd_BitOr", "BitOr_BitAnd"),
        )
    ),
    *(
        f"core/ReplaceComparisonOperator_{pair}"
        for pair in (
            *("Lt_LtE", "Lt_Gt", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_Lt", "GtE_Gt", "GtE_Lt"),
            *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
        )
    ),
    "core/ReplaceUnaryOperator_USub_UAdd",
    "core/ReplaceUnaryOperator_Delete_Not",
]


def meaning(source: str) -> str:
    """Return what a program does: its tree without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield what was changed, as a line before and after, and the changed source."""
    seen = {meaning(source)}
    for name in OPERATORS:
        if name not in plugins.operator_names():
            raise SystemExit(f"cosmic-ray has no operator {name}")
        operator = plugins.get_operator(name)()
        for occurrence in range(10_000):
            changed = mutating.mutate_code(source, operator, occurrence)
            if changed is None:
                break
            try:
                same = meaning(changed)
            except SyntaxError:
                continue
            if same in seen:
                continue
            seen.add(same)
            pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
            number, (before, after) = next(
                (i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]
            )
            yield f"{number}: {before.strip()}  ->  {after.strip()}", changed


class Changed(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Import one module from another source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != self.name:
            return None
        origin = ROOT / (name.replace(".", "/") + ".py")
        return importlib.util.spec_from_file_location(name, origin, loader=self)

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        exec(compile(self.source, self.name, "exec"), vars(module))


def outcome(module: str, source: str, tests: list[str], limit: float) -> str:
    """Run the tests in a forked process; return "killed", "survived" or "timeout"."""
    pid = os.fork()
    if pid == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.meta_path.insert(0, Changed(module, source))
        import pytest

        # The shape checks would recompile every module for each mutant; what only they would find
        # counts as survived here.
        flags = "-x -q -n 0 -p no:cacheprovider -p no:jaxtyping --assert=plain -o addopts= -m"
        paths = [str(ROOT / "tests" / test) for test in [*tests, "test_api.py"]]
        ran = pytest.main([*flags.split(), "not slow", "--rootdir", str(ROOT), *paths])
        os._exit(int(ran))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def main() -> None:
    """Run the mutants and write what became of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="; ".join(MODULES))
    parser.add_argument("--sample", type=int, help="as many mutants of each module, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one mutant")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    # What every test imports; nothing of ours, which each process imports anew.
    import pytest  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    results: dict[str, dict[str, str]] = {}
    for key in options.modules:
        module, tests = MODULES[key]
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        if outcome(module, source, tests, 600) != "survived":
            raise SystemExit(f"the tests of {key} fail without any change")
        found = list(mutants(source))
        chosen = found
        if options.sample is not None and options.sample < len(found):
            chosen = random.Random(options.seed).sample(found, options.sample)
        results[key] = {}
        for what, changed in chosen:
            result = outcome(module, changed, tests, options.limit)
            results[key][what] = result
            if result != "killed":
                print(f"{key}  {result}  {what}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1))
        count = len(chosen)
        left = sum(r == "survived" for r in results[key].values())
        print(f"{key}: {count} of {len(found)} mutants, {count - left} killed, {left} survived")


if __name__ == "__main__":
    main()
