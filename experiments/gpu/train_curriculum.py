"""Train a row of remember/rows through the first stages of its curriculum, with its first seed.

    python experiments/gpu/train_curriculum.py Remember --row armt --stages 5 --out rows.json

Nothing is left behind but the file. Its rows are lines of the table's results, one for each stage: append them there,
and ``curriculum.py`` counts them. Ends with status 1 if a stage did not finish.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from memformer_pl.sweeps import rows, runner

sys.path.insert(0, str(Path(__file__).parents[1] / "remember"))
import curriculum


def main() -> int:
    """Train the stages, and write what each reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=curriculum.STAGES)
    parser.add_argument("--row", required=True, help="the row to train")
    parser.add_argument("--stages", type=int, required=True, help="how many, from the first on")
    parser.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="options of every stage")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        table = rows.read(curriculum.TABLE)._replace(ledger=Path(folder) / "rows.jsonl")
        (chain,) = curriculum.chains(table, given.task, stages=given.stages, only=[given.row]).values()
        sweep = runner.Sweep(options=given.options, threads=1)
        done = curriculum.train(sweep, table, chain, table.seeds[0], runs=Path(folder))
        if not done:
            last = max(Path(folder).rglob("log.txt"), key=lambda log: log.stat().st_mtime)
            print(last.read_text(encoding="utf-8"))
        settings = {"task": given.task, "seed": table.seeds[0], "options": given.options}
        lines = rows.results(table._replace(rows=chain))
        given.out.write_text(json.dumps({"settings": settings, "rows": lines}, indent=1) + "\n")
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())
