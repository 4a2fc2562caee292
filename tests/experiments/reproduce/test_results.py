# SPDX-License-Identifier: MIT
"""The command, end to end on tiny networks; missing data; stored runs; what is written."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.reproduce import command, registry
from ddpnopt.experiments.reproduce.ablation import configure
from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings
from ddpnopt.experiments.reproduce.describe import closeness
from ddpnopt.experiments.reproduce.fig4 import _reach
from ddpnopt.experiments.reproduce.outcome import QUICK, Outcome, Request, rerun, write
from ddpnopt.experiments.reproduce.runs import estimate
from ddpnopt.experiments.reproduce.schema import load, packaged
from ddpnopt.experiments.reproduce.table3 import table3
from ddpnopt.experiments.reproduce.twin_tables import table6
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.training import train

app = typer.Typer()
app.command()(command.reproduce_command)


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tiny(name: str, folder: Path, **changes: str) -> Path:
    """A copy of a packaged file with a tiny network and few samples, seeds and thresholds."""
    text = packaged(name)
    wanted = {
        "architecture": '"mlp-4x1-tanh"',
        "batch": "64",
        "epochs": "1",
        "seeds": "2",
        "choosing_seeds": "1",
        "clip": "[0.5, 1.0]",
        **changes,
    }
    for key, value in wanted.items():
        text = re.sub(rf"^{key} = [^#\n]*", f"{key} = {value} ", text, flags=re.MULTILINE)
    text = text.replace("[network]\n", "[network]\ntrain_samples = 100\n", 1)
    path = folder / "my.toml"
    path.write_text(text)
    return path


def request(folder: Path, **changes: object) -> Request:
    return Request(folder, SqliteStore(folder / "store.sqlite"), **changes)


def test_table6_end_to_end_and_again(tmp_path: Path) -> None:
    settings = tiny("table6", tmp_path)
    arguments = ("table6", "--settings", settings, "--out", tmp_path / "out", "--jobs", 1)
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    rows = pd.read_csv(tmp_path / "out" / "table6.csv")
    assert list(rows["method"]) == ["baseline", "paper", "defaults", "clipped"] * 2
    assert list(rows["published"][:2]) == [0.035, 0.032]
    assert (rows["seeds"] == 2).all() and not rows["quick"].any()
    assert rows["verdict"][0].startswith("baseline, ")
    words = r"(same sign|opposite sign|no difference), (not )?significant"
    assert all(re.fullmatch(words, v) for v in rows["verdict"][rows["method"] != "baseline"])
    for row in rows[rows["method"] != "baseline"].itertuples():
        assert row.low <= row.difference <= row.high
        assert row.verdict.endswith("not significant") == (row.low <= 0 <= row.high)
    page = (tmp_path / "out" / "table6.md").read_text()
    assert "mlp-4x1-tanh" in page and "0.0350" in page and QUICK not in page
    assert "| worst seed |" in page and "Baseline columns" in page

    store = SqliteStore(tmp_path / "out" / "store.sqlite")
    before = len(store.results())
    assert before == 2 * 4 + 2  # 4 columns x 2 seeds, 2 thresholds on a choosing seed
    assert invoke(*arguments).exit_code == 0
    assert len(store.results()) == before
    again = pd.read_csv(tmp_path / "out" / "table6.csv")
    pd.testing.assert_frame_equal(rows, again)


def test_twin_differences_are_paired_by_seed(tmp_path: Path) -> None:
    outcome = table6(request(tmp_path, settings=tiny("table6", tmp_path)))
    runs = {
        (r.config.label, r.config.seed): r for r in SqliteStore(tmp_path / "store.sqlite").results()
    }
    paper = next(label for label, _ in runs if "riccati" in label)
    losses = {key: run.epochs[-1].running_loss for key, run in runs.items()}
    gaps = [losses[paper, s] - losses["SGD", s] for s in (0, 1)]
    row = outcome.rows[(outcome.rows["method"] == "paper")].iloc[0]
    assert row["difference"] == pytest.approx(sum(gaps) / 2)
    assert row["measured"] == pytest.approx(sum(losses[paper, s] for s in (0, 1)) / 2)
    assert row["worst"] == max(losses[paper, s] for s in (0, 1))


def test_without_running_cells_are_visibly_empty(tmp_path: Path) -> None:
    outcome = table6(request(tmp_path, settings=tiny("table6", tmp_path), run=False))
    assert set(outcome.rows["verdict"]) == {"not run"}
    assert outcome.rows["measured"].isna().all()
    assert not SqliteStore(tmp_path / "store.sqlite").results()
    write(outcome, tmp_path / "out")


def test_other_data_have_no_published_numbers(tmp_path: Path) -> None:
    settings = tiny("table6", tmp_path, dataset='"wine"')
    outcome = table6(request(tmp_path, settings=settings))
    assert outcome.rows["published"].isna().all()
    assert set(outcome.rows["verdict"]) <= {"baseline", "significant", "not significant"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_counts_of_one_seed_say_that_they_mean_little(tmp_path: Path, seeds: int) -> None:
    path = tiny("table6", tmp_path)
    made = table6(request(tmp_path, seeds=seeds, settings=path))
    for said in (made.summary, made.notes[0]):
        assert ("With one seed nothing is significant" in said) == (seeds == 1)


def test_titles_name_the_settings_own_optimizer_and_data(tmp_path: Path) -> None:
    path = tiny("table6", tmp_path, dataset='"wine"', baseline='"adam"')
    title = table6(request(tmp_path, run=False, settings=path)).title
    assert title == "Table 6: Adam and DDPNOpt with M = identity on WINE"


def test_a_folder_that_cant_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(request: Request) -> Outcome:
        raise AssertionError("measured in vain")

    monkeypatch.setitem(registry.RESULTS, "fig3", never)
    (tmp_path / "file").touch()
    said = invoke("fig3", "--out", tmp_path / "file")
    assert said.exit_code == 2 and "can't be made" in said.output


def test_running_loss_is_another_number(tmp_path: Path) -> None:
    columns = {
        measure: table6(
            request(tmp_path, settings=tiny("table6", tmp_path, loss_measure=f'"{measure}"'))
        ).rows["measured"][0]
        for measure in ("train", "running")
    }
    # One epoch: the loss as the steps saw it is higher than the one at its end.
    assert columns["running"] > columns["train"]


def test_quick_is_marked_everywhere(tmp_path: Path) -> None:
    settings = tiny("fig4", tmp_path, lr="[0.4]", eps_vxx="[1e-4]", curve_lr="0.4")
    settings.write_text(re.sub("curve_eps_vxx = .*", "curve_eps_vxx = 1e-4", settings.read_text()))
    result = invoke("fig4", "--quick", "--settings", settings, "--out", tmp_path, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert QUICK in result.output.replace("\n", " ")
    assert QUICK in (tmp_path / "fig4.md").read_text()
    rows = pd.read_csv(tmp_path / "fig4.csv")
    assert rows["quick"].all() and set(rows["part"]) == {"heat map", "curve"}
    assert (tmp_path / "fig4.png").stat().st_size > 20_000
    assert "--quick" in (tmp_path / "fig4.md").read_text()


def test_fig4_is_baseline_minus_twin(tmp_path: Path) -> None:
    settings = tiny("fig4", tmp_path, epochs="2", lr="[0.4, 0.7]", eps_vxx="[5e-5, 5e-4]")
    text = settings.read_text()
    # The first block alone.
    settings.write_text("[[block]]".join(text.split("[[block]]")[:2]))
    outcome = registry.RESULTS["fig4"](request(tmp_path, settings=settings))
    heat = outcome.rows[outcome.rows["part"] == "heat map"]
    first = heat[(heat["lr"] == 0.4) & (heat["eps_vxx"] == 5e-5)].iloc[0]
    assert first["published"] == pytest.approx(0.1974 - 0.1662)
    cells = registry.RESULTS["table9"](
        request(tmp_path, settings=settings_without_curves(settings))
    ).rows
    own = cells[(cells["lr"] == 0.4) & (cells["eps_vxx"] == 5e-5)].iloc[0]
    base = cells[(cells["lr"] == 0.4) & (cells["method"] == "baseline")].iloc[0]
    assert first["measured"] == pytest.approx(base["measured"] - own["measured"])
    assert first["low"] == pytest.approx(-own["high"])
    assert "baseline minus twin" in outcome.notes[0]
    curve = outcome.rows[(outcome.rows["part"] == "curve") & (outcome.rows["epoch"] == 2)]
    assert len(curve) == 4  # both tables come from the same trainings
    assert len(SqliteStore(tmp_path / "store.sqlite").results()) == 2 * 5 * 2 + 2 * 2


def settings_without_curves(path: Path) -> Path:
    other = path.with_name("other.toml")
    other.write_text(re.sub(r"curve_\w+ = .*\n", "", path.read_text()))
    return other


TABLE3 = """
[[problem]]
name = "WINE"
dataset = "wine"
architecture = "mlp-4x1-tanh"
batch = 71
epochs = 1
seeds = 2
[[problem]]
name = "SVHN, conv"
dataset = "svhn"
architecture = "cnn-2"
batch = 128
epochs = 1
seeds = 2
[[method]]
label = "SGD"
optimizer = "sgd"
candidates = [{ lr = 0.01 }, { lr = 0.5 }]
[[method]]
label = "Adam"
optimizer = "adam"
candidates = [{ lr = 0.001 }]
not_on = { "WINE" = "because" }
"""


def test_table3_cells_without_data_say_why_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("ddpnopt.experiments.loaders.openml.fetch", refuse)
    path = tmp_path / "my.toml"
    path.write_text(TABLE3)
    rows = table3(request(tmp_path, settings=path)).rows.set_index(["problem", "method"])
    assert rows["published"].isna().all()
    wine = rows.loc["WINE", "SGD"]
    assert wine["seeds"] == 2 and wine["lr"] in (0.01, 0.5) and wine["tried"] == 2
    assert rows.loc["WINE", "Adam"]["verdict"] == "not run: because"
    for method in ("SGD", "Adam"):
        cell = rows.loc["SVHN, conv", method]
        assert cell["seeds"] == 0 and cell["measured"] != cell["measured"]
        assert "--data" in cell["verdict"] and "--download" in cell["verdict"]
    empty = tmp_path / "data"
    empty.mkdir()
    rows = table3(request(tmp_path, settings=path, data=empty)).rows
    assert "train_32x32.mat" in rows[rows["problem"] == "SVHN, conv"]["verdict"].iloc[0]


def test_names(tmp_path: Path) -> None:
    result = invoke("tabel6", "--out", tmp_path)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "table10" in text and "Did you mean 'table6'?" in text
    result = invoke("table6", "table7", "--settings", "x.toml", "--out", tmp_path)
    assert result.exit_code == 2
    names = (
        "table3 table4 table5 table6 table7 table8 table9 table10 fig3 fig4 fig5 fig6 fig7 fig10"
    )
    assert list(registry.RESULTS) == names.split()


def test_printed_settings_are_the_packaged_ones(tmp_path: Path) -> None:
    result = invoke("table9", "--print-settings", "--out", tmp_path)
    assert result.exit_code == 0 and result.output == packaged("table9")


def test_one_result_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Request) -> Outcome:
        raise ValueError("no such luck")

    def mistaken(_: Request) -> Outcome:
        raise KeyError("of ours")

    def fine(_: Request) -> Outcome:
        return Outcome("table7", "Seven", "", pd.DataFrame({"published": [1.0]}))

    results = {"table6": broken, "fig6": mistaken, "table7": fine}
    monkeypatch.setattr(command, "RESULTS", results)
    result = invoke("all", "--out", tmp_path)
    assert result.exit_code == 1 and "no such luck" in result.output
    assert "KeyError: 'of ours'" in result.output and "1 of 3 results" in result.output
    assert (tmp_path / "table7.csv").exists()
    # Alone, a mistake of the program shows where it is.
    assert isinstance(invoke("fig6", "--out", tmp_path).exception, KeyError)


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Request) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "RESULTS", {"table6": interrupted})
    result = invoke("table6", "--out", tmp_path)
    assert result.exit_code == 130 and "the same command" in " ".join(result.output.split())


def test_written_rows_begin_with_what_names_the_cell_and_have_all_columns(tmp_path: Path) -> None:
    rows = pd.DataFrame({"lr": [0.1], "published": [1.0], "measured": [float("nan")], "x": [2]})
    files = write(Outcome("table9", "Nine", "setting", rows, quick=True), tmp_path)
    assert [f.name for f in files] == ["table9.csv", "table9.md"]
    header = files[0].read_text().splitlines()[0].split(",")
    assert header[:5] == ["lr", "published", "measured", "sd", "seeds"]
    assert header[-2:] == ["x", "quick"]


def test_the_command_to_make_it_again_has_what_decides_the_numbers(tmp_path: Path) -> None:
    asked = request(Path("a b"), seeds=3, epochs=2, quick=True, data=Path("d"), download=True)
    assert rerun(asked, "table3") == (
        "ddpnopt reproduce table3 --seeds 3 --epochs 2 --data d --download --quick --out 'a b'"
    )


def test_closeness_is_a_factor_in_loss_and_points_in_accuracy() -> None:
    rows = pd.DataFrame(
        {
            "measure": ["train_loss"] * 2 + ["accuracy"] * 2 + ["accuracy"],
            "method": ["baseline"] * 4 + ["paper"],
            "baseline": "sgd",
            "lr": [0.1, 0.2, 0.1, 0.2, 0.1],
            "published": [1.0, 1.0, 90.0, 80.0, 1.0],
            "measured": [2.0, 0.5, 91.0, 77.0, 9.0],
            "deviation": 1.0,
        }
    )
    said = closeness(rows)
    assert "a factor of 2.00 (geometric mean) (sgd 0.1: +100 %, sgd 0.2: -50 %)" in said
    assert "2.0 points off on average (sgd 0.1: +1.0, sgd 0.2: -3.0)" in said


@pytest.mark.parametrize(
    ("printed", "measured", "reach"),
    [
        (0.5, 0.6, 0.6),
        (0.5, 9.0, 1.5),
        (2.0, 1.0, 2.0),
        (math.nan, 0.3, 0.3),
        (math.nan,) * 2 + (1.0,),
    ],
)
def test_one_large_difference_leaves_colour_for_the_others(
    printed: float, measured: float, reach: float
) -> None:
    cells = pd.DataFrame(
        {
            "method": ["paper", "paper", "defaults"],
            "published": [printed, math.nan, math.nan],
            "measured": [-measured, 0.1 * measured, 1e3],
        }
    )
    assert _reach(cells) == pytest.approx(reach)


def test_estimates_rest_on_stored_seconds(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    table6(request(tmp_path, settings=tiny("table6", tmp_path)))
    done = store.results()[0]
    longer = done.config.model_copy(update={"epochs": 50, "seed": 77})
    same_kind = [
        r.seconds
        for r in store.results()
        if (r.config.optimizer, len(r.config.options)) == ("sgd", len(longer.options))
    ]
    seconds = estimate([longer], store)
    assert 50 * min(same_kind) * 0.99 <= seconds <= 50 * max(same_kind) * 1.01
    assert estimate([longer, longer], store) == pytest.approx(2 * seconds)


def test_files_of_the_package_are_found_where_it_is_installed() -> None:
    for name in registry.RESULTS:
        text = packaged(name)
        assert text.startswith("# SPDX-License-Identifier: MIT")
        assert f"ddpnopt reproduce {name} --settings my.toml" in text


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_twin_without_feedback_is_its_baseline(number: int) -> None:
    block = load(AblationSettings, "table9").block[number]
    base = RunConfig(architecture="mlp-6x2-tanh", batch=32, epochs=1, train_samples=320)
    borrowed = train(configure(base, block.baseline_run, block.lr[0], 3))
    for name, options in (block.defaults, block.paper(1e-4)):
        twin = train(configure(base, (name, {**options, "feedback": False}), block.lr[0], 3))
        assert twin.train_loss == pytest.approx(borrowed.train_loss, rel=1e-4)
        closed = train(configure(base, (name, options), block.lr[0], 3))
        assert closed.train_loss != pytest.approx(borrowed.train_loss, rel=1e-4)
