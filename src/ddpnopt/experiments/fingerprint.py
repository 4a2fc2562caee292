# SPDX-License-Identifier: MIT
"""A name for the code that made a number: change the numerics, and old results are not used."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
#: A training's numbers come from this module and everything of the package that it imports.
TRAINING = "ddpnopt.experiments.training"
#: Libraries whose version can change the last bit of a number, by distribution name.
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn")


def package_version() -> str:
    """Return the installed version of ddpnopt; "unknown" where it runs without installation."""
    return _version("ddpnopt")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _file(module: str, package: Path) -> Path | None:
    """The source of a dotted name of the package; None for names that are no module."""
    base = package.joinpath(*module.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _imports(path: Path, package: Path) -> Iterator[str]:
    """Dotted names of the package that a file imports, inside functions too."""
    here = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may be a module itself.
            yield from (stem, *(f"{stem}.{alias.name}" for alias in node.names))


def numeric_files(*modules: str, package: Path = PACKAGE) -> list[Path]:
    """List the sources that can change what `modules` compute: theirs and all that they import.

    Args:
        modules: Dotted names; `TRAINING` where none is given.
        package: The folder of the package's sources.

    Returns:
        The files in the order of their paths. Plots, pages and commands are not among them,
        since no numeric module imports them; the library itself always is, whole.

    Raises:
        ValueError: A module does not exist.
    """
    # The library is whole among them: it looks parts up by name, so imports might miss one. It
    # never imports the experiments, so only those need to be followed.
    library = {
        path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "experiments"
    }
    found: set[Path] = set()
    waiting: list[Path] = []
    for module in modules or (TRAINING,):
        path = _file(module, package)
        if path is None:
            raise ValueError(f"no module {module!r} in {package}")
        waiting.append(path)
    while waiting:
        path = waiting.pop()
        if path in found or path in library:
            continue
        found.add(path)
        named = {name for name in _imports(path, package) if name.split(".")[0] == package.name}
        waiting += filter(None, (_file(name, package) for name in named))
    return sorted(found | library)


@cache
def code_hash(*modules: str, package: Path = PACKAGE) -> str:
    """Hash the numeric code: sources, the package's version, and the libraries' versions.

    Read once per process, so that one sweep writes under one name.

    Args:
        modules: Dotted names of the measuring modules; `TRAINING` where none is given.
        package: The folder of the package's sources.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: A module does not exist.
    """
    digest = hashlib.sha256(repr([package_version(), *map(_version, LIBRARIES)]).encode())
    for path in numeric_files(*modules, package=package):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}:{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
