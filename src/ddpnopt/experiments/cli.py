# SPDX-License-Identifier: MIT
"""Entry point of the command `ddpnopt`: says what to install where the extra is missing."""

from __future__ import annotations

import sys

HINT = "needs the experiments extra: pip install 'ddpnopt[experiments]'"

EXTRA_MODULES = frozenset(
    {
        "jinja2",
        "joblib",
        "markdown_it",
        "markupsafe",
        "matplotlib",
        "numpy",
        "pandas",
        "pydantic",
        "rich",
        "scipy",
        "sklearn",
        "typer",
    }
)


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: At the end, as command lines do; status 1 with a one-line hint where a
            package of the extra is missing.
        ModuleNotFoundError: A module is missing that isn't part of the extra.
    """
    try:
        from ddpnopt.experiments.commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_MODULES:
            raise
        sys.exit(f"ddpnopt: the command line {HINT} (missing: {missing})")
    app()


if __name__ == "__main__":
    main()
