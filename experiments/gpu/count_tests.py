"""Run test files, and count what passed, failed and was skipped in each test.

    python experiments/gpu/count_tests.py tests/training/test_gpu.py --out tests.json

Shapes are not checked and warnings are not errors: another release of a library may warn, and beartype may be missing.
Ends with status 1 if a test failed, or if none passed.
"""

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}
"""What a test has become, by the element that pytest adds; without one it passed."""


def counted(report: str) -> list[dict[str, Any]]:
    """A row for each test of a JUnit report, its parameters taken together, with the first failure's message."""
    rows: dict[str, dict[str, Any]] = {}
    for case in ET.fromstring(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        row = rows.setdefault(name, {"test": name, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "why": ""})
        row["seconds"] = round(row["seconds"] + float(case.attrib["time"]), 2)
        result = next((child for child in case if child.tag in OUTCOMES), None)
        row["passed" if result is None else OUTCOMES[result.tag]] += 1
        if result is not None and not row["why"]:
            row["why"] = result.attrib.get("message", "").partition("\n")[0]
    return list(rows.values())


def main() -> int:
    """Run the files, and write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", default="", help="part of the names of the tests to run; by default all run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ours = ["-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", f"--junit-xml={report}", "-ra"]
        subprocess.run([sys.executable, "-m", "pytest", *ours, "-k", options.only, *options.files], check=False)
        rows = counted(report.read_text())
    settings = Counter(passed=0, failed=0, skipped=0)
    for row in rows:
        settings.update({outcome: row[outcome] for outcome in settings})
    options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return int(settings["failed"] > 0 or settings["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
