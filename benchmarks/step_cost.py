# SPDX-License-Identifier: MIT
"""The benchmark as a script: the command `ddpnopt bench` under its old name.

Examples:
    python benchmarks/step_cost.py --nets 1 2 3 --rounds 30 --threads 2 --json results/bench.json
    python benchmarks/step_cost.py --from results/bench.json --markdown
"""

import typer

from ddpnopt.experiments.bench_command import EPILOG, bench_command

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(epilog=EPILOG)(bench_command)
    app()
