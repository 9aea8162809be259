"""Execute the numbered notebooks and the solutions of their exercises, each in a fresh kernel.

    python tools/notebooks.py                executed copies, figures and models under build/
    python tools/notebooks.py --commit       rewrite notebooks/ and figures/ (make figures)
    python tools/notebooks.py --only 03      those whose name begins so, a notebook and its solutions
    python tools/notebooks.py --solutions    the solutions alone; they save no figures

The profile (`OASIS_VQ_PROFILE`, quick by default) says how much they train. In the quick profile the models are
trained from scratch, in build/quick; in the full one they are those of `OASIS_VQ_MODELS` or saved_models.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from oasis_vq.files import write_whole
from oasis_vq.tables import escaped

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
REPOSITORY = ""
"""Owner and name on GitHub. With it each notebook gets a badge that opens it in Colab, and fetches the repository
there; without, as long as there is no public address, neither. The notebooks follow when they are executed."""


def notebook_paths() -> list[Path]:
    """Return the numbered notebooks in their order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def solution_paths() -> list[Path]:
    """Return the solutions of their exercises, each named as its notebook, in the same order."""
    return sorted((NOTEBOOKS / "solutions").glob("[0-9][0-9]_*.ipynb"))


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Return a hash of the code cells: outputs belong to the code that has it."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def is_skipped(cell: nbformat.NotebookNode) -> bool:
    """Return whether a cell is left out: explorers need somebody to move them, and leave nothing in the file."""
    return NotebookClient.skip_cells_with_tag.default_value in cell.metadata.get("tags", [])


def set_address(notebook: nbformat.NotebookNode, folder: str, name: str, repository: str) -> None:
    """Write the badge into the first cell, and what Colab fetches into the first code cell, or take both out.

    Args:
        notebook: is changed.
        folder: where it is in the repository.
        name: of its file.
        repository: owner and name on GitHub, or nothing.
    """
    text, setup = notebook.cells[0], next(cell for cell in notebook.cells if cell.cell_type == "code")
    badge, clone = "", ""
    missing = f"; run from the {folder.rpartition('/')[2]} folder of a clone"
    if repository:
        link = f"https://colab.research.google.com/github/{repository}/blob/main/{folder}/{name}"
        badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n\n"
        clone = f"    !git clone --quiet --depth 1 https://github.com/{repository}.git\n"
        clone += f"    %cd -q {repository.rpartition('/')[2]}/{folder}\n"
        missing = ", and this repository"
    text.source = badge + re.sub(r"^\[!\[Open in Colab.*\n+", "", text.source)
    without = re.sub(r"    (!git clone|%cd) .*\n", "", setup.source)
    setup.source = re.sub(r"(packages are missing).*\n", rf"\1{missing}\n{clone}", without)


def execute(path: Path) -> nbformat.NotebookNode:
    """Return the notebook executed from top to bottom, with outputs and nothing of this machine."""
    notebook = nbformat.read(path, as_version=4)
    if path.is_relative_to(NOTEBOOKS):
        set_address(notebook, path.parent.relative_to(ROOT).as_posix(), path.name, REPOSITORY)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],  # the kernel warns of its local connection
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a progress bar that has gone leaves an empty stream
            cell.outputs = [output for output in cell.outputs if output.get("text", "it").strip()]
        if is_skipped(cell):  # what an editor has left there
            cell.outputs, cell.execution_count = [], None
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "oasis_vq": {"code_hash": code_hash(notebook)},
    }
    return notebook


def captions(table: str) -> str:
    """Return a LaTeX figure, with its caption and label, for each figure in the table of figures/README.md.

    Raises:
        ValueError: if there is none.
    """
    figures = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"\]\((\w[\w.]*)\.png\)", cells[0]):
            lines = [
                r"\begin{figure}[tb]", rf"\includegraphics[width=\linewidth]{{{{{name}}}.pdf}}",
                rf"\caption{{{escaped(cells[-1])}}}", rf"\label{{fig:{name}}}", r"\end{figure}",
            ]  # fmt: skip
            figures.append("\n".join(lines) + "\n")
    if not figures:
        raise ValueError("No figure in the table of figures/README.md.")
    return "\n".join(figures)


def main() -> int:
    """Execute the notebooks and return 0, or 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="rewrite notebooks/ and figures/")
    parser.add_argument("--only", default="", metavar="NN", help="beginning of the names to execute")
    parser.add_argument("--solutions", action="store_true", help="leave the numbered notebooks out")
    arguments = parser.parse_args()
    quick = (os.environ.get("OASIS_VQ_PROFILE") or "quick") == "quick"
    target = NOTEBOOKS if arguments.commit else BUILD / "notebooks"
    os.environ["OASIS_VQ_FIGURES"] = str(ROOT / "figures" if arguments.commit else BUILD / "figures")
    if quick:
        os.environ["OASIS_VQ_MODELS"] = str(BUILD / "quick")
        if not (arguments.only or arguments.solutions):
            shutil.rmtree(BUILD / "quick", ignore_errors=True)
    # Paths are given from here and read in the folder of each notebook.
    for variable in ("OASIS_VQ_DATA", "OASIS_VQ_MODELS", "OASIS_VQ_PHANTOM"):
        if os.environ.get(variable):
            os.environ[variable] = str(Path(os.environ[variable]).resolve())
    os.environ.pop("MPLBACKEND", None)  # the kernel has its own: figures go into the notebook
    paths = solution_paths() if arguments.solutions else notebook_paths() + solution_paths()
    paths = [path.relative_to(NOTEBOOKS) for path in paths if path.name.startswith(arguments.only)]
    for path in paths:
        print(f"{path.as_posix()} … ", end="", flush=True)
        start = time.monotonic()
        try:
            notebook = execute(NOTEBOOKS / path)
        except CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(target / path, f"{nbformat.writes(notebook)}\n".encode())
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    if arguments.commit:
        table = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
        write_whole(ROOT / "figures" / "captions.tex", captions(table).encode())
    print(f"{len(paths)} notebooks in {target.relative_to(ROOT)}, figures in "
          f"{Path(os.environ['OASIS_VQ_FIGURES']).relative_to(ROOT)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
