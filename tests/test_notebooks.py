"""The notebooks run from the first cell to the last, and are committed without outputs."""

import json
import shutil
from pathlib import Path

import pytest
from nbmake.nb_run import NotebookRun

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


# the kernel's client warns about its own deprecations
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_any_folder(
    path: Path, pack_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = {
        "CHECKPOINTS": pack_cache / "none",
        "STEPS": 1,
        "SEGMENTS": 6,
        "LAYERS": 1,
        "CORPUS": "Pydoc",
        "MEMFORMER_CACHE": pack_cache,
    }
    for name, value in shorter.items():
        monkeypatch.setenv(name, str(value))
    error = NotebookRun(Path(shutil.copy(path, tmp_path)), default_timeout=300).execute().error
    assert error is None, error.trace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    executed = [cell["source"] for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
    assert not executed, f"run nbstripout {path}"


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3
