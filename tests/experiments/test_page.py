# SPDX-License-Identifier: MIT
"""The page: everything inside one file, hostile text shown as text, missing results visible."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from ddpnopt.experiments import report_command as command
from ddpnopt.experiments.page import Section, environment, failed_section, render, section
from ddpnopt.experiments.page.render import _packaged
from ddpnopt.experiments.page.sections import data_uri, duration, markdown_html
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.reproduce.outcome import QUICK, Outcome, Request, View
from ddpnopt.experiments.store import SqliteStore

HOSTILE = "<script>alert('x')</script>"
VERDICTS = (
    "same sign, significant",
    "same sign, not significant",
    "opposite sign, significant",
    "not run",
)


def figure() -> Figure:
    drawn = Figure(figsize=(4, 3))
    drawn.subplots().plot([1, 2], [3, 4])
    return drawn


def outcome(name: str = "table6", measured: bool = True, **changes: object) -> Outcome:
    numbers = [1.0, 2.5, 3.0, math.nan] if measured else [math.nan] * 4
    rows = pd.DataFrame(
        {
            "optimizer": [f"own {HOSTILE}"] * 4,
            "published": [1.25] * 4,
            "measured": numbers,
            "verdict": VERDICTS if measured else ["not run"] * 4,
        }
    )
    made = Outcome(
        name=name,
        title=f"{name.capitalize()}: {HOSTILE}",
        settings=f"- data: DIGITS {HOSTILE}",
        rows=rows,
        notes=(f"**See** {HOSTILE} ![p](https://evil.test/p.png) [l](javascript:alert(1))",),
        figure=figure,
        command=f"ddpnopt reproduce {name} --out results",
        seconds=90.0,
        views=(View(f"Loss {HOSTILE}", pd.DataFrame({"lr": ["0.1"], "loss": ["1.5 ± 0.2"]})),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collects tags, attributes and visible text; every tag must be closed in order."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(*sections: Section, **changes: object) -> Reader:
    arguments: dict[str, object] = {"date": "2026-01-02", "store": f"s{HOSTILE}.sqlite", **changes}
    return Reader(render(sections, {"ddpnopt": "1", "x": HOSTILE}, **arguments))  # type: ignore[arg-type]


def test_nothing_comes_from_elsewhere_and_nothing_runs() -> None:
    remark = f"remark {HOSTILE}"
    read = page(section(outcome()), failed_section("fig3", ValueError(HOSTILE)), remarks=[remark])
    assert not read.named("script") and not read.named("iframe")
    (picture,) = read.named("img")
    assert (picture["src"] or "").startswith("data:image/svg+xml;base64,")
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            value = attributes.get(name)
            # A link in a note is shown, and does nothing until it is followed.
            assert value is None or value.startswith(("#", "data:", "https://evil.test"))
    assert "url(" not in _packaged("style.css") and "@import" not in _packaged("style.css")
    (policy,) = [m["content"] for m in read.named("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    # Title, heading, caption, notes, settings, cells, store, environment, remark and message.
    assert read.words.count(HOSTILE) >= 12


def test_structure_for_readers_of_all_kinds() -> None:
    read = page(section(outcome()), section(outcome("fig4", measured=False)))
    (root,) = read.named("html")
    assert root["lang"] == "en"
    assert len(read.named("main")) == len(read.named("nav")) == len(read.named("h1")) == 1
    assert {h["scope"] for h in read.named("th")} == {"col", "row"}
    assert all(i["alt"] for i in read.named("img"))
    ids = [a["id"] for _, a in read.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for a in read.named("a")}
    assert {f"#{i}" for i in ("summary", "table6", "fig4", "environment", "again")} <= targets
    assert all(t and t[1:] in ids for t in targets if t and t.startswith("#"))
    scrolling = [d for d in read.named("div") if "scroll" in (d.get("class") or "")]
    # What scrolls in its own box can be reached and is named.
    assert len(scrolling) >= len(read.named("table"))
    assert all(d["tabindex"] == "0" and d["aria-label"] for d in scrolling)


def test_a_section_counts_and_shows() -> None:
    made = section(outcome())
    assert (made.state, made.measured, made.total) == ("incomplete", 3, 4)
    assert (made.judged, made.same, made.significant, made.against) == (3, 2, 1, 1)
    kinds = [row[-2].kind for row in made.cells.rows] if made.cells else []
    assert kinds == ["same", "", "against", "empty"]
    words = page(made).words
    for text in (
        "3 of 4",
        "2 of 3 (1)",
        "1 of 3",
        "1.5 min",
        "1.5 ± 0.2",
        "Some cells have not been measured",
        "ddpnopt reproduce table6 --out results",
        "data: DIGITS",
        "2026-01-02",
        "1 of 1 results have been run",
    ):
        assert text in words, text
    full = outcome()
    whole = section(replace(full, rows=full.rows.assign(measured=1.0)))
    assert whole.state == "complete"


def test_what_has_not_been_run_says_so_and_draws_nothing() -> None:
    def refuse() -> Figure:
        raise AssertionError("drawn")

    made = section(outcome("fig4", measured=False, figure=refuse))
    assert made.state == "not run" and made.picture == ""
    words = page(made).words
    assert "Not run yet: ddpnopt reproduce fig4 --out results" in words
    assert "0 of 1 results have been run" in words
    bare = outcome("fig5", rows=pd.DataFrame({"dataset": ["x"]}))
    assert section(bare).state == "not run"


def test_quick_runs_are_marked() -> None:
    assert QUICK not in page(section(outcome())).words
    words = page(section(outcome(quick=True))).words
    assert words.count(QUICK) == 2 and words.count("quick run") >= 3


def test_failed_results_are_named() -> None:
    words = page(failed_section("fig3", OSError("disk"))).words
    assert "This result can't be shown: OSError: disk" in words and "fig3 failed" in words


def test_markdown_is_escaped_and_wide_tables_scroll() -> None:
    html = str(markdown_html("**b** <i>x</i> [l](javascript:x)\n\n| a |\n| --- |\n| 1 |"))
    assert "<strong>b</strong>" in html and "&lt;i&gt;" in html
    assert 'href="javascript' not in html
    assert '<div class="scroll"' in html and '<th scope="col">a</th>' in html


def test_figures_are_vectors_unless_large_and_the_same_each_time() -> None:
    assert data_uri(figure()) == data_uri(figure())
    dots = Figure()
    dots.subplots().plot(*np.random.default_rng(0).normal(size=(2, 20_000)), "o")
    uri = data_uri(dots)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.partition(",")[2]).startswith(b"\x89PNG")


def test_durations() -> None:
    assert [duration(s) for s in (5, 90, 7200)] == ["5 s", "1.5 min", "2.0 h"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough(theme: int) -> None:
    blocks = re.findall(r":root \{([^}]*--paper[^}]*)\}", _packaged("style.css"))
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[theme]))
    pairs = [(ink, back) for ink in ("ink", "faint", "link") for back in ("paper", "soft")]
    pairs += [("same", "paper"), ("against", "paper"), ("warn-ink", "warn")]
    pairs += [("same", "same-back"), ("against", "against-back")]
    for ink, back in pairs:
        assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)


def test_environment_names_versions_and_no_machine() -> None:
    found = environment()
    assert {"ddpnopt", "numeric code", "Python", "torch", "platform", "threads"} <= set(found)
    assert all(found.values())


app = typer.Typer()
app.command("report")(command.report_command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "TERM": "dumb"})


def result_of(seed: int) -> RunResult:
    epoch = Epoch(epoch=1, train_loss=0.5, test_accuracy=0.5, seconds=0.1)
    return RunResult(
        config=RunConfig(seed=seed),
        epochs=(epoch,),
        train_loss=0.5,
        test_accuracy=0.5,
        chance=0.1,
        seconds=0.1,
        diverged=False,
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.sqlite"
    SqliteStore(path).append(result_of(0))
    for seed in (1, 2):
        SqliteStore(path, code="older").append(result_of(seed))
    return path


def test_command_builds_the_page_from_the_store_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []

    def table6(request: Request) -> Outcome:
        requests.append(request)
        return outcome(quick=request.quick)

    def table7(request: Request) -> Outcome:
        requests.append(request)
        return outcome("table7", measured=request.quick, quick=request.quick)

    def fig3(request: Request) -> Outcome:
        raise KeyError("damaged")

    def fig4(request: Request) -> Outcome:
        return outcome("fig4", measured=False, quick=request.quick)

    results = {"table6": table6, "table7": table7, "fig3": fig3, "fig4": fig4}
    made = command.collect
    monkeypatch.setattr(command, "collect", lambda request, own: made(request, results, own))
    result = run("--store", str(store), "--seeds", "3", "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert "not run yet: fig4" in result.output and "fig3 can't be shown" in result.output
    assert not any(r.run for r in requests)
    assert {(r.seeds, r.epochs) for r in requests} == {(3, 2)}
    # Full results first; quick ones only where there is nothing else.
    assert [r.quick for r in requests] == [False, False, True]
    read = Reader((store.parent / "report.html").read_text())
    assert "2 of 4 results have been run" in read.words
    assert "holds 1 trainings" in read.words and "2 more were made by other" in read.words
    assert "KeyError: 'damaged'" in read.words
    requests.clear()
    assert run("--store", str(store), "--quick").exit_code == 0
    assert [r.quick for r in requests] == [True, True]


def test_a_users_own_settings_file_is_shown(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: dict[str, Request] = {}

    def show(name: str) -> Callable[[Request], Outcome]:
        def result(request: Request) -> Outcome:
            requests[name] = request
            return outcome(name)

        return result

    made = command.collect
    results = {"table6": show("table6"), "table7": show("table7")}
    monkeypatch.setattr(command, "collect", lambda request, own: made(request, results, own))
    mine = tmp_path / "my.toml"
    assert run("--store", str(store), "--settings", f"table6={mine}").exit_code == 0
    assert (requests["table6"].settings, requests["table7"].settings) == (mine, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["table6"], "give NAME=FILE"),
        (["tabel6=my.toml"], "Did you mean 'table6'?"),
        (["table6=a.toml", "table6=b.toml"], "table6 has two files"),
        (["table6=missing.toml"], "missing.toml: can't be read"),
    ],
)
def test_wrong_settings_are_refused_and_no_page_is_written(
    store: Path, given: list[str], message: str
) -> None:
    page = store.parent / "page.html"
    options = [part for one in given for part in ("--settings", one)]
    result = run("--store", str(store), "--out", str(page), *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\u2502", " ").split())
    assert not page.exists()


def test_every_registered_result_has_a_section(store: Path) -> None:
    out = store.parent / "page" / "all.html"
    result = run("--store", str(store), "--out", str(out), "--quick")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size < 3 * 2**20
    read = Reader(out.read_text())
    ids = {a.get("id") for a in read.named("section")}
    assert set(command.RESULTS) <= ids
    assert "can't be shown" not in read.words
    assert read.words.count("Not run yet:") == len(command.RESULTS)


def test_the_summary_counts_printed_cells_alone() -> None:
    rows = pd.DataFrame(
        {
            "published": [1.0, 1.0, 1.0, math.nan, math.nan],
            "measured": [1.0, 1.0, 1.0, 1.0, 1.0],
            "verdict": [
                *VERDICTS[:1],
                VERDICTS[2],
                "no difference, not significant",
                *VERDICTS[:2],
            ],
        }
    )
    found = section(replace(outcome(), rows=rows))
    assert (found.judged, found.same, found.significant, found.against) == (3, 1, 1, 1)


def test_the_page_names_no_folder_of_the_machine(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = store.parent / "page.html"
    assert run("--store", str(store), "--out", str(page), "--quick").exit_code == 0
    assert str(store.parent.resolve()) not in page.read_text()
    # Where it can be, the command is one that works where the page was made.
    (tmp_path / "results" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert command._shown(Path("results/mine")) == Path("results/mine")
    assert command._shown(tmp_path / "results") == Path("results")
    assert command._shown(tmp_path) == Path(".")
    assert command._shown(tmp_path.parent / "other") == Path("other")


def test_places(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.parent
    assert command.places(store, None) == (store, folder / "report.html")
    assert command.places(folder, None) == (store, folder / "report.html")
    assert command.places(None, folder) == (store, folder / "report.html")
    assert command.places(None, folder / "a.html") == (store, folder / "a.html")
    assert command.places(store, folder / "sub") == (store, folder / "sub" / "report.html")
    with pytest.raises(ValueError, match="ddpnopt reproduce NAME --out DIR"):
        command.places(folder / "nowhere.sqlite", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="results/store.sqlite: no such file"):
        command.places(None, None)
    with pytest.raises(ValueError, match=r"give an \.html file or a folder"):
        command.places(None, store)
    assert run("--store", "nowhere").exit_code == 2
