"""The command ``evaluate``: run tasks of the LM evaluation harness with a checkpoint, and print their table.

Tasks are those of the harness, whose data it downloads, and files of your own, which may read data from disk.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from memformer_pl.atomic_write import atomic_write, require_apart, require_writable
from memformer_pl.cli.options import Parser, add_checkpoint, add_device, load_reader, require_file
from memformer_pl.errors import LARGEST, OptionError, UsageError, nearest, require_sizes

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_checkpoint(parser)
    parser.add_argument("--tasks", required=True, nargs="+", type=str, help="Names of tasks or groups of tasks.")
    parser.add_argument("--include_path", type=str, help="Folder with task files of your own, in YAML.")
    parser.add_argument("--num_fewshot", type=int, help="Examples before each item; by default as the task says.")
    parser.add_argument("--limit", type=int, help="Items of each task to run, from the first; by default all.")
    parser.add_argument("--batch_size", type=int, default=8, help="Requests to read in parallel.")
    parser.add_argument("--out", type=str, help="File for the results in JSON; by default they are only printed.")
    add_device(parser)


def run(options: Namespace, parser: Parser) -> None:
    """Run the tasks, print their table and write their results.

    Raises:
        UsageError: lm-eval is not installed, the checkpoint is unusable or does not read text, or there is no such
            task.
    """
    try:
        require_sizes(most=LARGEST, batch_size=options.batch_size)
        if options.limit is not None:
            require_sizes(limit=options.limit)
        if options.num_fewshot is not None:
            require_sizes(least=0, num_fewshot=options.num_fewshot)
    except ValueError as mistake:
        parser.error(str(mistake))
    if options.out is not None:
        require_file(options, "out", parser)
        folder = [Path(options.include_path)] if options.include_path is not None else []
        require_apart("out", [Path(options.out)], read=[Path(options.ckpt_path), *folder])
        require_writable(Path(options.out))
    try:
        from memformer_pl.inference.harness import HarnessModel
    except ModuleNotFoundError as missing:
        raise UsageError(str(missing)) from missing
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    manager = task_manager(options)
    model, tokenizer = load_reader(options, parser)
    results = simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=options.batch_size),
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        device=str(next(model.parameters()).device),
        log_samples=False,
        task_manager=manager,
    )
    print(make_table(results))
    if options.out is not None:
        results["config"]["ckpt_path"] = options.ckpt_path
        with atomic_write(options.out) as path:
            path.write_text(json.dumps(results, indent=2, default=handle_non_serializable) + "\n", encoding="utf-8")
        print(f"Written: {options.out}")


def task_manager(options: Namespace) -> "TaskManager":
    """What finds the tasks. The tasks of the harness are read only if ``include_path`` has not all: that takes seconds.

    Raises:
        UsageError: ``include_path`` is not a folder, or there is no such task.
    """
    from lm_eval.tasks import TaskManager

    manager = None
    if options.include_path is not None:
        if not Path(options.include_path).is_dir():
            raise UsageError(f"include_path must be a folder with task files, but {options.include_path!r} is not")
        manager = TaskManager(include_path=options.include_path, include_defaults=False)
    if manager is None or not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=options.include_path)
    for name in options.tasks:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            raise OptionError(f"there is no task {name!r}" + (f". Did you mean {near}?" if near else ""))
    return manager
