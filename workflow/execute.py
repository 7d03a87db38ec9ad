"""Execute one chapter with papermill and write a clean notebook.

    python workflow/execute.py notebooks/01_vi_recap.py                 # refresh its .ipynb pair
    python workflow/execute.py notebooks/01_vi_recap.py out.ipynb       # somewhere else
    python workflow/execute.py notebooks/01_vi_recap.py out.ipynb --parameters smoke.yaml

What cannot be (a file of parameters that is none, a folder that is missing, a value that the
chapter refuses) ends it with one line and exit code 2, before the chapter does any work. The .py
file is what runs; the .ipynb beside it is only ever written. The result appears under its name when
it is complete, free of times and paths, so that two runs on one machine are equal to the byte. If a
cell fails, its error is printed and the notebook up to there is kept in .cache/failed.
"""

import glob
import json
import keyword
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

from amortised.commands import Parser, command, tidy

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# One thread per chapter: chapters share the cores among themselves, and sums in floating point do
# not change with the number of cores. A fixed hash seed fixes the order of sets. The kernel and the
# settings of Jupyter come from this environment alone, neither from the reader's home, which may be
# missing or read-only, nor from a folder that JUPYTER_PATH names.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "IPYTHONDIR": str(CACHE / "ipython"),
    "JUPYTER_PATH": "",
    "JUPYTER_CONFIG_DIR": str(CACHE / "jupyter"),
    "JUPYTER_DATA_DIR": str(CACHE / "jupyter"),
    "JUPYTER_RUNTIME_DIR": str(CACHE / "jupyter"),
    "MPLCONFIGDIR": str(CACHE / "matplotlib"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "torchinductor"),
    "PYTHONUTF8": "1",
}
LONGEST_TMPDIR = 60  # letters: the name of a socket has at most 107
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
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_TMPDIR else "/tmp"
    prefix = tidy(Path(short), "amortised-")
    with tempfile.TemporaryDirectory(dir=short, prefix=prefix) as scratch:
        # Sockets in files of our own: two kernels that start together cannot race for one port.
        files = {"connection_file": f"{scratch}/kernel.json"}
        files |= {"transport": "ipc", "ip": f"{scratch}/kernel"}
        notebook = papermill.execute_notebook(
            read_chapter(source),
            partial,
            parameters,
            cwd=source.parent,
            progress_bar=False,
            request_save_on_cell_execute=False,
            coalesce_streams=True,
            config=Config(KernelManager=files),
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
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_parameters(path: Path) -> dict:
    """The values of a YAML file of parameters; :class:`ValueError` if it is none.

    They are written into the chapter as assignments, so that only names and plain data may pass.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("give each value in full, without an alias")
        found = yaml.safe_load(text)
        json.dumps(found)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "is not YAML"
        raise ValueError(f"{path} {what}: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds more than plain data: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r:.80}, which is no mapping of names to values")
    for name in found or {}:
        if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name):
            raise ValueError(f"{path}: {name!r:.80} is no name of a parameter")
    return found or {}


def check_places(source: Path, *outputs: Path | None) -> None:
    """:class:`ValueError` unless there is such a chapter and what is written has a folder."""
    if source.suffix != ".py" or not source.is_file():
        raise ValueError(f"there is no chapter {source}; give one, such as notebooks/NN_slug.py")
    for path in filter(None, outputs):
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"needs a folder {path.parent}: make it"
            raise ValueError(f"output {path} {what}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a chapter, notebooks/NN_slug.py")
    parser.add_argument("output", type=Path, nargs="?", help="default: the .ipynb beside it")
    parser.add_argument("--parameters", type=Path, help="a YAML file of parameters")
    parser.add_argument("--timing", type=Path, help="write the wall time here, as JSON")
    options = parser.parse_args(arguments)
    os.environ.update(KERNEL_ENVIRONMENT)
    source = options.source
    try:
        check_places(source)
        output = (options.output or source.with_suffix(".ipynb")).resolve()
        check_places(source, output, options.timing)
        parameters = read_parameters(options.parameters) if options.parameters else {}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    failed = CACHE / "failed" / f"{source.stem}.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    # A build that was killed may have left an execution of this chapter behind: let it end first.
    lock = CACHE / "locks" / re.sub(r"\W+", "-", str(output))
    with hold(lock, f"executing {source.stem}"):
        for path in filter(None, (output, options.timing)):  # likewise
            for stale in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*"):
                stale.unlink()
        started = time.monotonic()
        try:
            notebook = execute(source, parameters, failed)
        except PapermillExecutionError as error:
            if "checks.parameters(" in error.source:  # refused before any work
                print(error.evalue, file=sys.stderr)
                return 2
            print(f"{source.stem}: failed in cell [{error.exec_count}], kept in {failed}")
            traceback = "\n".join(error.traceback)
            print(traceback if sys.stdout.isatty() else re.sub(r"\x1b\[[\d;]*m", "", traceback))
            return 1
        except DeadKernelError:
            print(f"{source.stem}: its kernel was killed, perhaps for want of memory")
            return 1
        except KeyboardInterrupt:
            print(f"{source.stem}: stopped", file=sys.stderr)
            return 130
        failed.unlink(missing_ok=True)
        write_text(output, nbformat.writes(notebook) + "\n")
        seconds = time.monotonic() - started
        if options.timing:
            record = {"chapter": source.stem, "seconds": round(seconds, 1), "finished": time.time()}
            write_text(options.timing, json.dumps(record) + "\n")
    line = f"{source.stem:<24} executed in {seconds:5.1f} s\n"
    print(line, end="", flush=True)  # one write: other chapters are executed at the same time
    return 0


if __name__ == "__main__":
    command(main)
