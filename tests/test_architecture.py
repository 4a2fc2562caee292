# SPDX-License-Identifier: MIT
"""The architecture's rules, read off the source: who may import whom, who may register hooks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ddpnopt"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [f for f in FILES if "experiments" not in f.relative_to(PACKAGE).parts]
AXES = ("layers", "curvature", "value")
# The only files that may attach something to a user's module, tensor or optimizer.
HOOK_FILES = {
    "trajectory.py",
    "binding.py",
    "watching.py",
    "classification.py",
    "cuts.py",
    "open_loop.py",
    "captured/forward.py",
}
# Shape contracts are an optional import of this one file.
CONTRACT_FILES = {"typing.py": {"jaxtyping"}}
EXTRAS = (
    "beartype cloudpickle dask distributed hypothesis jaxtyping jinja2 joblib markdown_it "
    "markupsafe matplotlib numpy optuna pandas PIL pydantic pytest rich scipy sklearn typer"
).split()


def name_of(file: Path) -> str:
    """Dotted module name of a file of the package."""
    parts = ["ddpnopt", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, inside functions too."""
    package = name_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def label(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_the_package_is_found() -> None:
    assert PACKAGE / "__init__.py" in FILES


@pytest.mark.parametrize("axis", AXES)
def test_axes_do_not_import_each_other(axis: str) -> None:
    others = [f"ddpnopt.{other}" for other in AXES if other != axis]
    wrong = [
        f"{label(file)} imports {name}"
        for file in sorted((PACKAGE / axis).rglob("*.py"))
        for name in imports(file)
        if any(within(name, other) for other in others)
    ]
    assert not wrong, wrong


def test_modules_with_shapes_are_checked_under_pytest() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    named = re.search(r"--jaxtyping-packages=(\S+)", options["addopts"])
    assert named is not None
    *checked, checker = named[1].split(",")
    shaped = {name_of(file) for file in CORE if "Float[" in file.read_text()}
    # To check a sequence, beartype takes one item of it by Python's generator: each pass of the
    # crossing would change what a checkpoint holds.
    shaped -= {"ddpnopt.typing", "ddpnopt.crossing"}
    assert checker == "beartype.beartype" and shaped == set(checked)


@pytest.mark.parametrize("file", CORE, ids=label)
def test_core_imports_torch_alone(file: Path) -> None:
    allowed = {"torch", "ddpnopt", "__future__", *CONTRACT_FILES.get(label(file), ())}
    foreign = {
        name
        for name in imports(file)
        if name.split(".")[0] not in allowed | set(sys.stdlib_module_names)
    }
    assert not foreign, foreign
    assert not [name for name in imports(file) if within(name, "ddpnopt.experiments")]


def test_core_runs_without_the_extras() -> None:
    """Train one step in a process where importing any library of the extras fails."""
    modules = sorted(name_of(file) for file in CORE)
    program = f"""
import sys, warnings
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # None there: the import fails
warnings.simplefilter("ignore")
import importlib, torch
for name in {modules!r}:
    importlib.import_module(name)
from ddpnopt import DDPNOpt
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
optimizer = DDPNOpt(model, lr=0.1)
x, y = torch.randn(6, 4), torch.randint(3, (6,))
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hooks_live_in_one_place() -> None:
    hook = re.compile(r"register_\w*hook")
    wrong = [
        f"{label(file)}:{node.lineno} {node.attr}"
        for file in CORE
        if label(file) not in HOOK_FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and hook.fullmatch(node.attr)
    ]
    assert not wrong, wrong


def test_the_library_does_not_print() -> None:
    wrong = [
        f"{label(file)}:{node.lineno}"
        for file in CORE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert not wrong, wrong


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for file in FILES:
        text = file.read_text()
        if (lines := len(text.splitlines())) > 350:
            wrong.append(f"{label(file)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > 60:
                    wrong.append(f"{label(file)}: {node.name} has {lines} lines")
    assert not wrong, wrong


def tracked() -> list[Path]:
    """Text files under version control; a source archive has no such list."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [f for f in files if f.is_file() and f.suffix not in {".png", ".csv", ".svg", ".pt"}]


def test_nothing_names_the_machine_it_was_made_on() -> None:
    # Put together from parts, or this file would be its own first finding.
    local = ["/" + root + "/" for root in ("work", "root", "home", "tmp", "Users")]
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"))]
    words = [*local, "../" + "shared", *hosts]
    wrong = [
        f"{file.relative_to(ROOT)}: {word}"
        for file in tracked()
        for word in words
        if re.search(rf"(?<![\w.]){re.escape(word)}", file.read_text())
    ]
    assert not wrong, wrong


def test_python_files_carry_the_licence() -> None:
    wrong = [
        str(file.relative_to(ROOT))
        for file in tracked()
        if file.suffix == ".py"
        and not file.read_text().startswith("# SPDX-License-Identifier: MIT\n")
    ]
    assert not wrong, wrong
