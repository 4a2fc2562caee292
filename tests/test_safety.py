# SPDX-License-Identifier: MIT
"""Nothing that is read is run, and nothing is fetched unasked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpnopt

PACKAGE = Path(ddpnopt.__file__).parent
#: Whether this is a clone of the repository.
CLONE = (Path(__file__).parents[1] / ".ci").is_dir()
#: Calls that run what they are given, or unpickle it.
REFUSED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "torch.hub.load",
}
#: The one reader of pickles: it answers every name that a file asks for itself.
READER = "experiments/loaders/pickles.py"


def name_of(node: ast.expr) -> str:
    """Dotted name of what is called, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def constant(call: ast.Call, keyword: str) -> object:
    found = [k.value for k in call.keywords if k.arg == keyword]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def complaints(source: str) -> Iterator[str]:
    """What of a source is refused."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in REFUSED:
                    yield f"line {node.lineno}: imports {node.module}.{alias.name}"
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name in REFUSED:
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and constant(node, "weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and constant(node, "allow_pickle") is not False:
            yield f"line {node.lineno}: np.load without allow_pickle=False"
        if constant(node, "shell") is True:
            yield f"line {node.lineno}: shell=True"


def test_no_source_runs_what_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {
        path.relative_to(PACKAGE).as_posix(): list(complaints(path.read_text(encoding="utf-8")))
        for path in files
    }
    assert {name: list_ for name, list_ in found.items() if list_} == {}
    unpicklers = [p for p in files if "_Unpickler" in p.read_text(encoding="utf-8")]
    assert [p.relative_to(PACKAGE).as_posix() for p in unpicklers] == [READER]


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "pickle.loads(content)",
        "from pickle import loads",
        "subprocess.run(line, shell=True)",
        "joblib.load(path)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert len(list(complaints(source))) == 1


def test_the_search_lets_good_code_pass() -> None:
    good = "model.eval()\ntorch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)"
    assert list(complaints(good)) == []


OFFLINE = """
import sys
import tomllib
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        sys.stderr.write(f"{event} {arguments}\\n")
        raise SystemExit(f"network: {event}")
sys.addaudithook(refuse)
"""
LIBRARY = """
import torch, ddpnopt, ddpnopt.curvature, ddpnopt.value, ddpnopt.testing
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
for opt in (
    ddpnopt.DDPNOpt(model, curvature="ekfac"),
    ddpnopt.Feedback(model, torch.optim.AdamW(model.parameters())),
):
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
"""
COMMANDS = """
import ddpnopt.experiments.commands as commands
out = sys.argv[1]
line = ["train", "-d", "wine", "-a", "linear", "-e", "1", "-b", "64", "-o", out]
commands.app([*line, "--checkpoint", out + "/c"], standalone_mode=False)
print("done")
"""


def offline(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OFFLINE + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_step_and_training_need_no_network(tmp_path: Path) -> None:
    done = offline(LIBRARY + COMMANDS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


def test_the_block_blocks() -> None:
    done = offline("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')")
    assert done.returncode != 0 and "network:" in done.stderr


def pins(path: Path) -> dict[str, str]:
    """Versions by name of a file of requirements."""
    lines = path.read_text().splitlines()
    found = [line.rstrip("\\ ").split("==") for line in lines if re.match(r"[\w.-]+==", line)]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.skipif(not CLONE, reason="a source archive has no pins")
def test_every_pin_has_a_hash_and_every_dependency_a_pin() -> None:
    root = Path(__file__).parents[1]
    pinned, hashed = pins(root / "constraints.txt"), pins(root / ".ci" / "hashes.txt")
    # torch's build depends on the machine: it alone is installed without one.
    assert pinned.pop("torch") and hashed == pinned, "run `make hashes`"
    blocks = re.split(r"\n(?=[\w.-]+==)", (root / ".ci" / "hashes.txt").read_text())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    needed = project["build-system"]["requires"] + [
        line for extra in project["project"]["optional-dependencies"].values() for line in extra
    ]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", n)[0]).lower() for n in needed}
    assert names - {"ddpnopt"} <= set(pinned), "write the environment's `pip freeze`"


@pytest.mark.skipif(not CLONE, reason="a source archive has no Makefile")
def test_torch_is_the_only_install_without_hashes() -> None:
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    first, second, third = re.findall(r"\$\(PIP\) install (.*)", text)
    assert first.startswith("--no-deps \"$$(grep '^torch=='")
    assert "--require-hashes" in second and ".ci/hashes.txt" in second
    assert "--no-build-isolation -c constraints.txt" in third
