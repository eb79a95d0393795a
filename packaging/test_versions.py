"""Runs the tests with each minor version of torch once and each Python once: `make test-versions`.

Each pair has an environment, made by `make setup`; one that is there is used again. What passed goes into
docs/versions.json and onto docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "versions.json"
PAGE = RECORD.with_suffix(".md")
# Python, torch, torchrec, fbgemm.
VERSIONS = [
    ("3.12", "2.11.0", "1.6.1", "1.6.0"),
    ("3.10", "2.12.1", "1.7.0", "1.7.0"),
    ("3.11", "2.13.0", "1.8.0", "1.8.0"),
    ("3.13", "2.13.0", "1.8.0", "1.8.0"),
]
COLUMNS = ("python", "torch", "torchrec", "fbgemm-gpu-cpu", "numpy", "pyarrow", "passed", "failed", "skipped", "date")


def main() -> None:
    """Run all, or those of some Pythons, and tell what passed; the status is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs", help="where the environments are kept")
    parser.add_argument("--torch-index", default="", help="where torch is taken from; pip's own index unless given")
    parser.add_argument("--python", nargs="*", help="only these versions of Python")
    parser.add_argument("tests", nargs="*", help="only these tests; then nothing is recorded")
    options = parser.parse_args()
    records = []
    for python, torch, torchrec, fbgemm in VERSIONS:
        if options.python and python not in options.python:
            continue
        venv = options.venvs.resolve() / f"torch-{torch.rpartition('.')[0]}-python-{python}"
        variables = [f"VENV={venv}", f"PYTHON=python{python}", f"TORCH_INDEX={options.torch_index}"]
        variables += [f"TORCH={torch}", f"TORCHREC={torchrec}", f"FBGEMM={fbgemm}"]
        subprocess.run(["make", "setup", *variables], cwd=ROOT, check=True)
        records.append(run_tests(venv, variables, options.tests))
        if not options.tests:
            write_record(records[-1])
    print(table(records))
    sys.exit(any(record["failed"] for record in records))


def run_tests(venv: Path, variables: list[str], tests: list[str]) -> dict[str, Any]:
    """Run the tests in an environment.

    Returns:
        dict: versions, counts and the date.
    """
    results = venv / "tests.xml"
    results.unlink(missing_ok=True)
    command = ["make", "test", *variables, f"ARGS={' '.join([f'--junit-xml={results}', *tests])}"]
    subprocess.run(command, cwd=ROOT, check=False)
    counts = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in ElementTree.parse(results).getroot().iter("testsuite"):
        counts = {name: count + int(suite.attrib[name]) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    return {
        **versions(venv),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "date": datetime.date.today().isoformat(),
    }


def versions(venv: Path) -> dict[str, str]:
    """Of Python, and of what the package says that results depend on."""
    code = "import json, platform; from torchrec_amort.versions import installed_versions as installed; "
    code += "print(json.dumps({'python': platform.python_version(), **installed()}))"
    told = subprocess.run([venv / "bin" / "python", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(told.stdout.splitlines()[-1])
    return {name: found[name] for name in COLUMNS if name in found}


def write_record(record: dict[str, Any]) -> None:
    """Put it in place of the last one of the same Python, in the record and on the page."""
    kept = {minor_of(record): record for record in [*json.loads(RECORD.read_text()), record]}
    records = [kept[key] for key in sorted(kept)]
    RECORD.write_text(json.dumps(records, indent=2) + "\n")
    PAGE.write_text(re.sub(r"\| python \|.*?\n(?=\n)", f"{table(records)}\n", PAGE.read_text(), flags=re.DOTALL))


def minor_of(record: dict[str, Any]) -> tuple[int, ...]:
    """Of Python: 3.12 comes after 3.9."""
    return tuple(int(part) for part in record["python"].split(".")[:2])


def table(records: list[dict[str, Any]]) -> str:
    """The records as a table in Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *[[str(record[name]) for name in COLUMNS] for record in records]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
