# SPDX-License-Identifier: MIT
"""Settings files: every mistake is said with its line, its key and what is allowed."""

from __future__ import annotations

import tomllib

import pytest

from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings, Fig4Settings
from ddpnopt.experiments.reproduce.cost_settings import Figure3, Table4
from ddpnopt.experiments.reproduce.locate import line_of, lines_of
from ddpnopt.experiments.reproduce.policy_settings import Policies
from ddpnopt.experiments.reproduce.registry import RESULTS
from ddpnopt.experiments.reproduce.schema import SettingsError, load, packaged, parse
from ddpnopt.experiments.reproduce.table3_settings import Table3Settings
from ddpnopt.experiments.reproduce.table5 import Table5Settings
from ddpnopt.experiments.reproduce.vanishing_settings import Vanishing

ABLATION = ("table6", "table7", "table8", "table9", "table10")
MODELS = {
    **dict.fromkeys(ABLATION, AblationSettings),
    "fig4": Fig4Settings,
    "table3": Table3Settings,
    "table5": Table5Settings,
    "table4": Table4,
    "fig3": Figure3,
    **dict.fromkeys(("fig5", "fig7"), Policies),
    **dict.fromkeys(("fig6", "fig10"), Vanishing),
}


def test_every_result_has_a_valid_packaged_file() -> None:
    assert set(MODELS) == set(RESULTS)
    for name, model in MODELS.items():
        load(model, name)


def test_tables_6_to_10_and_fig_4_share_network_seeds_and_options() -> None:
    files = [tomllib.loads(packaged(name)) for name in (*ABLATION, "fig4")]
    assert all(f["network"] == files[0]["network"] for f in files)
    assert all(f["runs"] == files[0]["runs"] for f in files)
    options = {b["baseline"]: b.get("options") for b in files[-1]["block"]}
    for file in files:
        assert all(b.get("options") == options[b["baseline"]] for b in file["block"])


def mistakes(name: str, old: str, new: str) -> tuple[str, int]:
    """The error of a packaged file with one thing changed, and the line of the change."""
    text = packaged(name)
    assert text.count(old) >= 1
    line = text[: text.index(old)].count("\n") + 1
    with pytest.raises(SettingsError) as caught:
        parse(MODELS[name], text.replace(old, new, 1), "my.toml")
    return str(caught.value), line


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("table6", "batch = 8", "batch = 0", "network.batch = 0: allowed is a whole number, at l"),
        ("table6", "test_share =", "test_shar =", "unknown key 'test_shar' in network; known"),
        ("table6", "batch = 8", 'batch = "8"', "network.batch = '8': allowed is a whole number"),
        ("table6", "batch = 8", "batch = true", "network.batch = True: allowed is a whole number"),
        ("table6", "test_share = 0", "test_share = 1", "more than 0.0 and less than 1.0"),
        ("table6", "test_share = 0", "test_share = nan # 0", "network.test_share = nan"),
        ("table6", 'dataset = "digits"', 'dataset = "digit"', "Did you mean 'digits'?"),
        ("table6", 'scale = "standard"', 'scale = "standart"', "Did you mean 'standard'?"),
        ("table6", '"mlp-24x5-tanh"', '"mlp-24x5-tank"', "unknown activation 'tank'"),
        ("table6", 'loss_measure = "', 'loss_measure = "x', 'one of "train", "running"'),
        ("table9", "seeds = 10", "seeds = -3", "runs.seeds = -3: allowed is a whole number, at l"),
        ("table9", "lr = [0.05, ", "lr = [-0.05, ", "block[3].lr[1] = -0.05: allowed is a number"),
        ("table9", "lr = [0.05, 0.09", "lr = [0.05, 0.05", "0.05 stands in the list twice"),
        ("table9", "clip = [0.25", "clip = [0.0, 0.25", "more than 0"),
        ("table9", 'curvature = "rmsprop"', 'curvature = "rms"', "unknown curvature 'rms'"),
        ("fig4", "curve_lr = 0.03", "curve_lr = 0.031", "allowed is one of 0.01, 0.02, 0.03"),
        ("table6", '"mlp-24x5-tanh"', '"mlp-99999999x5-tanh"', "allowed is 1 to 10000"),
        ("table6", "first_choosing_seed = 1000", "first_choosing_seed = 9", "= 10 or more"),
        ("table9", "options = { alpha", "options = { alfa", "RMSprop has no option alfa"),
        ("table9", "damping = 0.05", 'damping = "a"', "block[3].options"),
        ("table3", "first_choosing_seed = 1000", "first_choosing_seed = 9", "= 10 or more"),
        ("table3", "conv = { update_every", "conv = { updat_every", "has no option updat_every"),
        ("table3", "short = [{ lr = 7e-4", "short = [{ lr = -7e-4", "short[1].lr = -0.0007"),
        ("table3", 'label = "Adam"', 'label = "RMSprop"', "the name of another method"),
        ("table3", '"SVHN, conv" = "left', '"SVHM, conv" = "left', "no problem has this name"),
        ("table4", 'published = "vanilla_ddp"', 'published = "x"', "known: first_order, vanilla"),
        ("table4", 'name = "Vanilla DDP"', 'name = "SGD"', "the name of another method"),
        ("table4", "line_search = false", "lin_search = false", "has no option lin_search"),
        ("table4", "time = { batch = [256, 512", "time = { batch = [512, 256", "in rising order"),
        ("fig3", 'baseline = "SGD"', 'baseline = "SGB"', "known: SGD, RMSprop"),
        ("fig3", 'name = "SGD"', 'name = ""', "allowed is text, not empty"),
        ("fig5", '"cnn-16"', '"cnm-16"', "unknown architecture 'cnm-16'"),
        ("fig5", '"cnn-16"', '"mlp-8x2-tanh"', "has no convolutions"),
        ("fig5", "options = { momentum", "options = { momentun", "no option momentun"),
        ("fig5", 'value = "low_rank"', 'value = "lowrank"', 'one of "low_rank", "gauss_newton"'),
        ("fig7", "vectors = 3", "vectors = 10", "at most triplets = 9"),
        ("fig6", "update_ratio = [5.0, 10.0]", "update_ratio = [5.0]", "allowed is a list of 2"),
        ("fig6", "update_ratio = [5.0, 10.0]", "update_ratio = [9.0, 5.0]", "the lower end"),
        ("fig6", "update_ratio = [5.0, 10.0]", "update_ratio = [-5.0, 1.0]", "more than 0"),
        ("fig6", "update_ratio = [5.0, 10.0]", "update_ratio = 3", "allowed is a list of 2"),
        ("fig10", "options = { damping", "options = { dampin", "EKFAC has no option dampin"),
        ("table5", "options = { damping", "options = { dampin", "EKFAC has no option dampin"),
        ("table5", "points = 2.0", "points = 0", "allowed is a number, more than 0.0 and at most"),
        ("table5", 'optimizer = "adam"', 'optimizer = "adan"', "Did you mean 'adam'?"),
    ],
)
def test_mistakes_name_the_line_and_what_is_allowed(
    name: str, old: str, new: str, said: str
) -> None:
    message, line = mistakes(name, old, new)
    assert said in message
    assert message.startswith(f"my.toml, line {line}: ")
    assert "\n" not in message


def test_options_that_do_not_fit_the_optimizer_have_their_own_line() -> None:
    message, line = mistakes("fig4", 'baseline = "rmsprop"', 'baseline = "adam"')
    # Four lines below: curvature, lr, eps_vxx, clip.
    assert f"my.toml, line {line + 5}: block[2].options: Adam has no option alpha" in message


def test_blocks_are_told_apart_by_their_baseline() -> None:
    text = packaged("table9").replace('baseline = "ekfac"', 'baseline = "sgd"')
    text = text.replace("options = { damping", "# options = { damping")
    line = text[: text.rindex("baseline = ")].count("\n") + 1
    with pytest.raises(SettingsError, match=f"line {line}: .*'sgd' is the name of another block"):
        parse(AblationSettings, text, "my.toml")


def test_a_missing_key_has_the_line_of_its_table() -> None:
    message, line = mistakes("table6", "batch = 8\n", "")
    header = packaged("table6").splitlines().index("[network]") + 1
    assert line != header
    assert message == f"my.toml, line {header}: key 'batch' is missing in network"


def test_every_mistake_is_listed() -> None:
    text = packaged("table6").replace("batch = 8", "batch = 0").replace("seeds = 10", "sedes = 10")
    with pytest.raises(SettingsError) as caught:
        parse(AblationSettings, text, "my.toml")
    assert len(str(caught.value).splitlines()) == 2


def test_broken_toml_names_the_line() -> None:
    with pytest.raises(SettingsError, match=r"my\.toml: not TOML: .*line 2"):
        parse(AblationSettings, "a = 1\nb = = 2\n", "my.toml")


def test_overlapping_seeds_are_refused() -> None:
    message, _ = mistakes("table6", "first_choosing_seed = 1000", "first_choosing_seed = 9")
    assert "9 to 11 overlap with the table's seeds 0 to 9" in message


TRICKY = '''# first
a = 1
"quoted key" = "x # no comment"
b.c = """
[not.a.table]
""" # after
[table] # trailing
list = [ # numbers
  1,
  # skipped
  [2, 3],
  { in = 1, out = "]" },
]
[[many]]
x = 'it"s'
[many.sub]
y = 1
[[many]]
x = 2026-01-01 00:00:00
[[many.deep]]
z = -inf
'''


def test_lines_of_everything_in_a_tricky_text() -> None:
    tomllib.loads(TRICKY)
    lines = lines_of(TRICKY)
    wanted = {
        ("a",): 2,
        ("quoted key",): 3,
        ("b", "c"): 4,
        ("table",): 7,
        ("table", "list"): 8,
        ("table", "list", 0): 9,
        ("table", "list", 1, 1): 11,
        ("table", "list", 2, "out"): 12,
        ("many", 0): 14,
        ("many", 0, "x"): 15,
        ("many", 0, "sub", "y"): 17,
        ("many", 1): 18,
        ("many", 1, "x"): 19,
        ("many", 1, "deep", 0, "z"): 21,
    }
    assert {path: lines.get(path) for path in wanted} == wanted
    assert line_of(lines, ("table", "list", 1, 7)) == 11
    assert line_of(lines, ("nothing",)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [("lr = [0.1]", "lr = [-1.0]"), ('baseline = "sgd"', 'baseline = "sdg"')],
)
def test_a_wrong_element_is_not_also_said_to_be_missing_from_its_list(old: str, new: str) -> None:
    message, line = mistakes("table6", old, new)
    assert message.count("\n") == 0 and f"line {line}: " in message
    assert "list of 1 or more" in mistakes("table6", "lr = [0.1]", "lr = []")[0]


def test_windows_line_ends() -> None:
    assert lines_of("a = 1\r\n[b]\r\nc = 2\r\n")[("b", "c")] == 3


def test_missing_file_says_how_to_begin(tmp_path) -> None:
    with pytest.raises(SettingsError, match="--print-settings"):
        load(AblationSettings, "table6", tmp_path / "none.toml")
