"""Commands that take hours, or data of one's own, are ones that their parsers take, with the files they name."""

import importlib
import shlex

import pytest

from tests.launch import ROOT
from tests.pages import commands

pytestmark = pytest.mark.docs

PAGES = ("data", "serving", "server", "results", "benchmarks")
LINES = [
    line
    for page in PAGES
    for line in commands(f"docs/{page}.md")
    if line.startswith("torchrec-amort ") and not line.startswith("torchrec-amort prepare ")
]


@pytest.mark.parametrize("line", LINES)
def test_the_command_is_one_that_its_parser_takes(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(line)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"torchrec_amort.apps.{name}").main([*arguments, "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    assert captured.out
