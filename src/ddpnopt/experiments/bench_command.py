# SPDX-License-Identifier: MIT
"""The command `ddpnopt bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ddpnopt.experiments.bench.cases import NETS, VARIANTS, chosen
from ddpnopt.experiments.bench.document import Document, DocumentError, joined, read
from ddpnopt.experiments.bench.program import PARTS, QUICK_ROUNDS, ROUNDS, Plan, run
from ddpnopt.experiments.bench.sheets import markdown, show
from ddpnopt.experiments.markdown import update_page

EPILOG = (
    "Example: [bold]ddpnopt bench --nets 2 --only 'DDPNOpt*' --rounds 10[/]; "
    "[bold]ddpnopt bench --from results/bench/bench.json --publish docs/speed.md[/]"
)
MARK = "bench"
NETS_HELP = "; ".join(f"{number}: {net.title}, batch {net.batch}" for number, net in NETS.items())

NetsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NET]...", help=f"Nets to measure, all if none is given. {NETS_HELP}."),
]
NetsOption = Annotated[
    list[str] | None,
    typer.Option("--nets", "--net", metavar="N", help="The same: --nets 1,2 or --nets 1 --nets 2."),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="Optimizer to measure beside SGD; repeatable, a pattern such as 'DDPNOpt*' is fine.",
    ),
]
PartOption = Annotated[
    list[str] | None,
    typer.Option("--part", help=f"What to measure, repeatable: {', '.join(PARTS)}; all if none."),
]
RoundsOption = Annotated[
    int | None,
    typer.Option("--rounds", min=1, help=f"Timed rounds; {ROUNDS}, and {QUICK_ROUNDS} in --quick."),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Torch's CPU threads.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch", "-b", min=1, help="Samples a step; each net's own.")
]
AutocastOption = Annotated[
    bool, typer.Option("--autocast", help="Nets 1 to 5 in bfloat16, by torch.autocast.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="A minute or two: to try it out, not a result.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for results.")]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="File of the figures; DIR/bench.json."),
]
FromOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Measure nothing: show the figures of this JSON; of several, put together.",
    ),
]
BeforeOption = Annotated[
    Path | None,
    typer.Option("--before", metavar="FILE", help="An earlier JSON, to stand beside the targets."),
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print Markdown.")]
PublishOption = Annotated[
    Path | None,
    typer.Option(
        "--publish", metavar="FILE", help="Put the Markdown into this page, at its marks."
    ),
]


def bench_command(
    more: NetsArgument = None,
    nets: NetsOption = None,
    only: OnlyOption = None,
    part: PartOption = None,
    rounds: RoundsOption = None,
    threads: ThreadsOption = 2,
    device: DeviceOption = "cpu",
    batch: BatchOption = None,
    autocast: AutocastOption = False,
    quick: QuickOption = False,
    out: OutOption = Path("results/bench"),
    json: JsonOption = None,
    source: FromOption = None,
    before: BeforeOption = None,
    as_markdown: MarkdownOption = False,
    publish: PublishOption = None,
) -> None:
    """Time, memory and operations of a training step, as ratios to plain SGD, beside the targets.

    Whole steps (zero_grad, forward, loss, backward, step), all optimizers in turn in one process.
    Optimizers of other packages (pytorch_optimizer, singd) take part where they are installed.
    """
    messages = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    try:
        earlier = None if before is None else read(before)
        if source:
            document = joined([read(one) for one in source])
        else:
            plan = Plan(
                parts=_parts(part or []),
                nets=_nets([*(nets or []), *(more or [])]),
                patterns=tuple(only or ()),
                rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
                threads=threads,
                device=_device(device),
                batch=batch,
                autocast=autocast,
                quick=quick,
                out=out,
                json=json or out / "bench.json",
            )
            for number in plan.nets:
                chosen(list(plan.patterns), number)
            document = run(plan, messages)
            messages.print(f"written: {plan.json}", soft_wrap=True, highlight=False)
        _deliver(document, earlier, as_markdown, publish, messages)
    except (DocumentError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if not source and _failed(document, messages):
        raise typer.Exit(1)


def _deliver(
    document: Document,
    before: Document | None,
    as_markdown: bool,
    publish: Path | None,
    messages: Console,
) -> None:
    """Print the tables, or their Markdown; put it into a page."""
    if as_markdown:
        sys.stdout.write(markdown(document, before))
    else:
        # A table in a log is not cut to the 80 columns of a terminal that is not there.
        show(document, Console(width=None if sys.stdout.isatty() else 130), before)
    if publish is not None:
        try:
            page = publish.read_text()
        except OSError as error:
            raise ValueError(f"--publish {publish}: {error.strerror}") from error
        publish.write_text(update_page(page, markdown(document, before), MARK))
        messages.print(f"written: {publish}", soft_wrap=True, highlight=False)


def _failed(document: Document, messages: Console) -> bool:
    """Say what could not be measured; whether anything of the library's or torch's was among it."""
    for failure in document.failures:
        messages.print(f"not measured: {failure}", markup=False, highlight=False, soft_wrap=True)
    peers = [name for name, variant in VARIANTS.items() if variant.package is not None]
    return any(not failure.startswith(tuple(peers)) for failure in document.failures)


def _nets(given: Sequence[str]) -> tuple[int, ...]:
    """Numbers of nets, from "1", "1,2" and the like."""
    texts = [text.strip() for item in given for text in item.split(",") if text.strip()]
    unknown = [text for text in texts if text not in map(str, NETS)]
    if unknown:
        raise ValueError(f"no net {unknown[0]!r}; known: {NETS_HELP}")
    return tuple(sorted({int(text) for text in texts})) or tuple(NETS)


def _parts(given: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in given if name not in PARTS]
    if unknown:
        raise ValueError(f"--part {unknown[0]}: known: {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in given) or PARTS


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
