"""What an install brings, needs and refuses."""

import configparser
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.launch import ROOT, launch
from torchrec_amort import versions
from torchrec_amort.apps.command import EXTRAS, MODULES

# Stands by itself: it runs where the package is installed, and its tests' requirements are not.
SCORE = """
from torchrec_amort import AmortizedScorer, Feature, ModelConfig, RequestBatch, RequestSchema, build_model
from torchrec_amort import InputError, load_package

schema = RequestSchema("films", (
    Feature("movie", "candidate", "id", 7, column="candidate_item"),
    Feature("candidate_item", "candidate", "item", 7),
    Feature("history_item", "event", "item", 7),
    Feature("liked", "candidate", "label"),
))
request = {"user": 1, "time": 5, "history_item": [1, 2], "history_time": [3, 4], "candidate_item": [3, 4, 5]}
model = build_model(schema, ModelConfig(embedding_dim=8)).eval()
scorer = AmortizedScorer(model, schema=schema)
expected = model(RequestBatch.from_requests([request], schema).to_impressions())
assert (scorer.score([request]) - expected).abs().max() < 1e-5
try:
    load_package("nowhere")
except InputError:
    pass
"""
WITHOUT_EXTRAS = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if {{name, name.partition(".")[0]}} & {packages} else found(name, path, target)

PathFinder.find_spec = find_spec
{score}
from torchrec_amort.apps import cli
told = {{}}
for command in {commands}:
    sys.argv, errors = ["torchrec-amort", *command], io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as end:
            told[command[0]] = [end.code, errors.getvalue()]
print(json.dumps(told))
"""
COMMANDS = {
    "train": ["--data=nowhere", "--run_folder=nowhere"],
    "evaluate": ["--run_folder=nowhere"],
    "compare": ["--data=nowhere", "--out=nowhere"],
    "benchmark": ["--run_folder=nowhere"],
    "pilot": ["--control.run_folder=nowhere", "--treatment.run_folder=nowhere", "--out=nowhere"],
    "load": ["--addresses=[nowhere:1]", "--data=nowhere", "--out=nowhere"],
    "export": ["--run_folder=nowhere", "--out=nowhere"],
}


def setup_cfg(section: str, name: str) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in parser[section][name].splitlines() if line and not line.startswith("#")]


def test_a_plain_install_scores_and_a_command_without_its_extra_says_what_to_install() -> None:
    packages = {MODULES.get(package, package) for extra in EXTRAS.values() for package in extra}
    commands = [[name, *options] for name, options in COMMANDS.items()]
    script = WITHOUT_EXTRAS.format(packages=packages, score=SCORE, commands=commands)
    told = json.loads(launch("python", "-c", script).stdout.splitlines()[-1])
    for command, extra in {
        "train": "train",
        "evaluate": "train",
        "compare": "train",
        "pilot": "report",
        "load": "client",
    }.items():
        first = EXTRAS[extra][0]
        assert told[command] == [2, f"error: {first} is not installed: pip install 'torchrec-amort[{extra}]'\n"]
    assert told["benchmark"] == told["pilot"]
    assert "nowhere/config.yaml: no such file" in told["export"][1]


def test_extras_are_those_that_commands_ask_for() -> None:
    for extra, packages in EXTRAS.items():
        assert {requirement.name for requirement in setup_cfg("options.extras_require", extra)} == set(packages)
    plain = {requirement.name for requirement in setup_cfg("options", "install_requires")}
    assert not plain & {package for extra in EXTRAS.values() for package in extra}


@pytest.mark.parametrize(
    ("torch_version", "installed", "message"),
    [
        ("2.13.0+cpu", {"torchrec": "1.7.0"}, r"torchrec 1.7.0 does not go with torch 2.13.0\+cpu: .*torchrec==1.8.\*"),
        (
            "2.11.0",
            {"torchrec": "1.6.1", "fbgemm-gpu": "1.8.0+cpu"},
            "fbgemm-gpu 1.8.0.cpu does not go with torch 2.11",
        ),
        ("2.12.1", {"torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.6.0"}, "fbgemm-gpu-cpu 1.6.0 .* 'fbgemm-gpu-cpu==1.7.*'"),
        ("2.14.1", {"torchrec": "1.9.0"}, "torch 2.14.1 is none of those .*: 2.11, 2.12, 2.13"),
        ("2.10.0", {}, "torch 2.10.0 is none of those"),
    ],
)
def test_versions_that_do_not_go_together_are_refused_before_they_are_imported(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, installed: dict[str, str], message: str
) -> None:
    pretend(monkeypatch, torch_version, installed)
    with pytest.raises(ImportError, match=message):
        versions.refuse_versions_apart()


@pytest.mark.parametrize(("torch_minor", "built_for_it"), versions.PAIRS.items())
def test_versions_that_go_together_are_those_that_pip_may_install(
    monkeypatch: pytest.MonkeyPatch, torch_minor: str, built_for_it: str
) -> None:
    pretend(monkeypatch, f"{torch_minor}.1", {"torchrec": f"{built_for_it}.1", "fbgemm-gpu": f"{built_for_it}.0"})
    versions.refuse_versions_apart()
    bounds = {requirement.name: requirement.specifier for requirement in setup_cfg("options", "install_requires")}
    assert bounds["torch"].contains(f"{torch_minor}.1")
    assert bounds["torchrec"].contains(f"{built_for_it}.1")
    assert bounds["fbgemm-gpu"].contains(f"{built_for_it}.0+cpu")
    for package, newer in {"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm-gpu": "1.9.0"}.items():
        assert not bounds[package].contains(newer)


def pretend(monkeypatch: pytest.MonkeyPatch, torch_version: str, installed: dict[str, str]) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(versions, "version", version)


def test_only_torch_is_taken_from_the_index_that_is_given(tmp_path: Path) -> None:
    index = "https://index.example/cpu"
    # Each is given: this may run under a make that was given others.
    setup = ("make", "--dry-run", "setup", f"VENV={tmp_path}", "TORCH=2.13.0")
    printed = launch(*setup, f"TORCH_INDEX={index}").stdout
    (line,) = [line for line in printed.splitlines() if index in line]
    assert line.split("install ")[1] == f"--quiet --index-url {index} torch==2.13.0"
    plain = launch(*setup, "TORCH_INDEX=").stdout
    assert "index-url" not in plain


def test_the_versions_on_the_page_are_those_that_passed() -> None:
    records = json.loads((ROOT / "docs" / "versions.json").read_text())
    table = runpy.run_path(str(ROOT / "packaging" / "test_versions.py"))["table"]
    assert table(records) in (ROOT / "docs" / "versions.md").read_text()
    assert {record["torch"].rpartition(".")[0] for record in records} <= set(versions.PAIRS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What git has of the project: pip leaves what it builds beside the source, and takes it again."""
    for name in launch("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines():
        copy = tmp_path / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    return tmp_path / "source"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_wheel_scores_without_extras_and_in_native_code(source: Path, tmp_path: Path) -> None:
    wheels = str(tmp_path / "wheels")
    launch("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, str(source))
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    python = fresh_environment(tmp_path / "fresh")
    run(python, "-m", "pip", "install", str(wheel))
    run(python, "-m", "pip", "check")
    run(python, "-c", f"import importlib.util as found; assert not any(map(found.find_spec, {EXTRAS['train']}))")
    run(python, "-c", SCORE + "AmortizedScorer(model, backend='native')")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "variables"), [([], {}), (["--no-build-isolation"], {"CC": "/bin/false", "CXX": "/bin/false"})]
)
def test_a_source_without_torch_or_a_compiler_scores_in_pytorch_and_says_why(
    options: list[str], variables: dict[str, str], source: Path, tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "fresh")
    run(python, "-m", "pip", "install", "setuptools>=77")
    run(python, "-m", "pip", "install", *options, str(source), **variables)
    log = "import logging; logging.basicConfig(level=logging.INFO, stream=sys.stdout)"
    told = run(python, "-c", f"import sys; {log}\n{SCORE}")
    assert "PyTorch serves what native code cannot" in told
    assert "a compiler and torch when installed" in told


def fresh_environment(folder: Path) -> Path:
    """Make an environment that has torch and what was built for it, which are large, by links to this one's.

    Returns:
        Path: its Python.
    """
    launch("python", "-m", "venv", str(folder / "venv"))
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    large = folder / "large"
    large.mkdir()
    # pip never touches what it finds by a path file.
    (site / "large.pth").write_text(f"{large}\n")
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"].replace("_", "-")
        if re.match(r"(torch|torchrec|fbgemm-gpu|fbgemm-gpu-cpu|triton|nvidia-.*|cuda-.*)$", name):
            for top in {file.parts[0] for file in distribution.files or ()} - {".."}:
                if not (large / top).exists():
                    (large / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "venv" / "bin" / "python"


def run(python: Path, *arguments: str, **variables: str) -> str:
    """Run Python away from the project, whose package would be found first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, check=False, cwd=python.parent, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
