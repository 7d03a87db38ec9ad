"""Execute one chapter with papermill and write a clean notebook.

    python workflow/execute.py notebooks/01_vi_recap.py                 # refresh its .ipynb pair
    python workflow/execute.py notebooks/01_vi_recap.py out.ipynb       # somewhere else
    python workflow/execute.py notebooks/01_vi_recap.py out.ipynb --parameters smoke.yaml

The .py file is what runs; the .ipynb beside it is only ever written. The result appears under its
name when it is complete, free of times and paths, so that two runs on one machine are equal to the
byte. If a cell fails, its error is printed and the notebook up to there is kept in .cache/failed.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
import papermill
import yaml
from locked import hold
from nbclient.exceptions import DeadKernelError
from nbstripout import strip_output
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# One thread per chapter: chapters share the cores among themselves, and sums in floating point do
# not change with the number of cores. A fixed hash seed fixes the order of sets. Jupyter's own
# settings come from this environment alone, not from the reader's home.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "IPYTHONDIR": str(CACHE / "ipython"),
}
RUN_METADATA = [
    "metadata.papermill",
    "metadata.language_info.version",
    "cell.metadata.papermill",
    "cell.metadata.execution",
]


def read_chapter(path: Path) -> nbformat.NotebookNode:
    """The notebook that the py:percent file describes, with the metadata that jupytext keeps."""
    notebook = jupytext.read(path, config=jupytext.config.load_jupytext_config(str(path)))
    notebook.metadata.pop("jupytext", None)
    for cell in notebook.cells:  # blank lines of the .py, which mean nothing in the pair
        cell.metadata.pop("lines_to_next_cell", None)
    return notebook


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove everything that differs between two runs: times, paths, random cell ids."""
    notebook = strip_output(
        notebook, keep_output=True, keep_count=True, keep_id=False, extra_keys=RUN_METADATA
    )
    for cell in notebook.cells:
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds an empty list to every cell
    return notebook


def execute(source: Path, parameters: dict, partial: Path | None = None) -> nbformat.NotebookNode:
    """Run the chapter in a fresh kernel; raise :class:`PapermillExecutionError` if a cell fails."""
    with tempfile.TemporaryDirectory() as scratch:
        # Sockets in files of our own: two kernels that start together cannot race for one port.
        sockets = {"transport": "ipc", "ip": f"{scratch}/kernel"}
        notebook = papermill.execute_notebook(
            read_chapter(source),
            partial,
            parameters,
            cwd=source.parent,
            progress_bar=False,
            request_save_on_cell_execute=False,
            coalesce_streams=True,
            config=Config(KernelManager=sockets),
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    if parameters:
        # The injected cell shows the values in force; the defaults need not be rendered beside it.
        for cell in notebook.cells:
            if "parameters" in cell.metadata.tags:
                cell.metadata.tags.append("remove-cell")
    return clean(notebook)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a chapter, notebooks/NN_slug.py")
    parser.add_argument("output", type=Path, nargs="?", help="default: the .ipynb beside it")
    parser.add_argument("--parameters", type=Path, help="a YAML file of parameters")
    parser.add_argument("--timing", type=Path, help="write the wall time here, as JSON")
    arguments = parser.parse_args()
    os.environ.update(KERNEL_ENVIRONMENT)
    source = arguments.source
    output = (arguments.output or source.with_suffix(".ipynb")).resolve()
    parameters = yaml.safe_load(arguments.parameters.read_text()) if arguments.parameters else {}

    failed = CACHE / "failed" / f"{source.stem}.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    # A build that was killed may have left an execution of this chapter behind: let it end first.
    lock = CACHE / "locks" / re.sub(r"\W+", "-", str(output))
    with hold(lock, f"executing {source.stem}"):
        started = time.time()
        try:
            notebook = execute(source, parameters or {}, failed)
        except PapermillExecutionError as error:
            print(f"{source.stem}: failed in cell [{error.exec_count}], kept in {failed}")
            traceback = "\n".join(error.traceback)
            print(traceback if sys.stdout.isatty() else re.sub(r"\x1b\[[\d;]*m", "", traceback))
            return 1
        except DeadKernelError:
            print(f"{source.stem}: its kernel was killed, perhaps for want of memory")
            return 1
        failed.unlink(missing_ok=True)
        write_text(output, nbformat.writes(notebook) + "\n")
        seconds = time.time() - started
        if arguments.timing:
            record = {"chapter": source.stem, "seconds": round(seconds, 1), "finished": time.time()}
            write_text(arguments.timing, json.dumps(record) + "\n")
    print(f"{source.stem:<24} executed in {seconds:5.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
