"""Train rows of a table with its first seed and every learning rate, and write a row of results for each run.

    python experiments/gpu/train_rows.py recall/mqar/published/rows --only gated_delta_net --out rows.json

Nothing is left behind but the file. Its rows are lines of the table's results: append them there to make the table.
Ends with status 1 if a run did not finish.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from memformer_pl.sweeps import rows, runner


def main() -> int:
    """Train the rows, and write what they reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", help="a rows.yaml, or the name of a shipped one")
    parser.add_argument("--only", nargs="+", required=True, metavar="ROW", help="rows to train")
    parser.add_argument("--workers", type=int, default=3, help="runs at once")
    parser.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="options of every run")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        table = rows.read(given.table)._replace(ledger=Path(folder) / "rows.jsonl")
        runs = runner.remaining(table, only=given.only, seeds=table.seeds[:1], runs=Path(folder))
        sweep = runner.Sweep(options=given.options, threads=1)
        with ThreadPoolExecutor(given.workers) as pool:
            outcomes = list(pool.map(sweep.train, runs))
        for run, outcome in zip(runs, outcomes, strict=True):
            print(f"{run.row.name}: {outcome}")
            if outcome not in runner.ENDED:
                print((run.folder / "log.txt").read_text(encoding="utf-8"))
        settings = {"table": table.name, "seed": table.seeds[0], "options": given.options}
        given.out.write_text(json.dumps({"settings": settings, "rows": rows.results(table)}, indent=1) + "\n")
    return int(any(outcome not in runner.ENDED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
