"""The committed notebooks: outputs belong to their code, and nothing of the machine they ran on is in them."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest

import notebooks as tool
import oasis_vq as ovq

ROOT = Path(__file__).parents[1]
PATHS = tool.notebook_paths()
SOLUTIONS = tool.solution_paths()
EVERY = pytest.mark.parametrize("path", PATHS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
PRIVATE = re.compile(r"/(home|root|Users|work|tmp|private|mnt|content)/|[A-Z]:\\\\|object at 0x")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_there_are_six_numbered_notebooks():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04", "05", "06"]


@EVERY
class TestExecuted:
    """What holds for numbered notebooks and solutions."""

    def test_outputs_belong_to_the_code(self, path):
        assert read(path).metadata.oasis_vq.code_hash == tool.code_hash(read(path)), "make figures"

    def test_executed_from_first_to_last(self, path):
        counts = [cell.execution_count for cell in code_cells(path) if not tool.is_skipped(cell)]
        assert counts == list(range(1, len(counts) + 1))
        assert not any(output.output_type == "error" for cell in code_cells(path) for output in cell.outputs)

    def test_cells_are_short(self, path):
        assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 15

    def test_names_the_source_of_its_pictures(self, path):
        assert "IXI dataset, brain-development.org, CC BY-SA 3.0" in read(path).cells[0].source

    def test_nothing_of_the_machine(self, path):
        notebook = read(path)
        assert set(notebook.metadata) == {"kernelspec", "language_info", "oasis_vq"}
        for cell in notebook.cells:
            assert set(cell.metadata) <= {"tags"}
            for output in cell.get("outputs", []):
                text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert not PRIVATE.search(text), text

    def test_small_enough_to_be_shown(self, path):
        assert path.stat().st_size < (1_250_000 if path in PATHS else 300_000)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
class TestNotebook:
    def test_only_explorers_are_skipped_and_leave_nothing(self, path):
        for cell in code_cells(path):
            assert tool.is_skipped(cell) == cell.source.startswith("ovq.explore_")
            assert not tool.is_skipped(cell) or (cell.execution_count is None and cell.outputs == [])

    def test_first_cell_is_the_same_everywhere(self, path):
        assert code_cells(path)[0].source == code_cells(PATHS[0])[0].source

    def test_figures_carry_the_notebooks_number(self, path):
        names = re.findall(r'save_figure\(figure, f?"(\w+)', "\n".join(cell.source for cell in code_cells(path)))
        assert names and all(name.startswith((path.name[:3], "00_")) for name in names)

    def test_figures_are_in_the_repository(self, path):
        for name in re.findall(r'save_figure\(figure, "(\w+)"', "\n".join(cell.source for cell in code_cells(path))):
            assert (ROOT / "figures" / f"{name}.png").exists() and (ROOT / "figures" / f"{name}.pdf").exists()

    def test_ends_with_findings_and_three_exercises(self, path):
        last = read(path).cells[-1].source
        assert "## What we saw" in last and last.count("\n- ") >= 3
        assert re.findall(r"^(\d)\. ", last, flags=re.MULTILINE) == ["1", "2", "3"]
        assert "## Next" in last

    def test_each_exercise_is_solved(self, path):
        """In a section that begins with its text, and has code."""
        exercises = re.findall(r"^\d\. (.+)$", read(path).cells[-1].source, flags=re.MULTILINE)
        cells = read(tool.NOTEBOOKS / "solutions" / path.name).cells
        starts = [number for number, cell in enumerate(cells) if cell.source.startswith("## ")]
        assert [cells[start].source.split("\n\n")[:2] for start in starts] == [
            [f"## Exercise {number}", f"> {text}"] for number, text in enumerate(exercises, 1)
        ]
        for start, end in itertools.pairwise([*starts, len(cells)]):
            assert any(cell.cell_type == "code" for cell in cells[start:end])


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
class TestSolution:
    def test_first_cell_is_that_of_the_notebooks_one_folder_deeper(self, path):
        first = code_cells(PATHS[0])[0].source
        for here, deeper in (("../req", "../../req"), ('("..")', '("../..")'), ("the notebooks", "the solutions")):
            first = first.replace(here, deeper)
        assert code_cells(path)[0].source == first

    def test_saves_no_figure_and_skips_nothing(self, path):
        for cell in code_cells(path):
            assert "save_" not in cell.source and not tool.is_skipped(cell)


@EVERY
def test_badge_and_clone_come_from_one_setting(path):
    notebook, committed = read(path), read(path)
    folder = path.parent.relative_to(ROOT).as_posix()
    for _ in range(2):  # the second time nothing is doubled
        tool.set_address(notebook, folder, path.name, "somebody/brains")
    first, setup = notebook.cells[0].source, next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert first.startswith("[![Open in Colab]") and first.count("somebody/brains") == 1
    assert f"(https://colab.research.google.com/github/somebody/brains/blob/main/{folder}/{path.name})\n\n#" in first
    lines = setup.splitlines()[2:7]
    assert lines[0] == 'if "google.colab" in sys.modules:  # there the packages are missing, and this repository'
    assert lines[1:3] == [
        "    !git clone --quiet --depth 1 https://github.com/somebody/brains.git", f"    %cd -q brains/{folder}"
    ]  # fmt: skip
    assert lines[3].startswith("    %pip install")
    tool.set_address(notebook, folder, path.name, tool.REPOSITORY)
    assert notebook == committed, "make figures"


@pytest.mark.parametrize("path", PATHS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_slice_position_is_named_by_its_number(path):
    """Those of ADNI begin at 78, and others where they will: `SliceIndex.positions_at` says which there are."""
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    assert not re.search(r"slice(_index)?\)? ?==? ?\d|slice, [\[(]\d|linspace\(\d+, ?\d\d|for position in \(\d", code)


def test_each_explorer_stands_in_one_notebook():
    cells = [cell.source for path in PATHS for cell in code_cells(path) if tool.is_skipped(cell)]
    names = [re.match(r"ovq\.(\w+)\(", source)[1] for source in cells]
    assert sorted(names) == sorted(name for name in ovq.__all__ if name.startswith("explore_"))


@pytest.mark.slow  # starts a kernel
def test_skipped_cells_are_emptied_and_not_executed(tmp_path):
    left = nbformat.v4.new_output("stream", text="left by an editor")
    skipped = nbformat.v4.new_code_cell(
        "1 / 0", execution_count=7, outputs=[left], metadata={"tags": ["skip-execution"]}
    )
    cells = [nbformat.v4.new_code_cell("1 + 1"), skipped, nbformat.v4.new_code_cell("2 + 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "some.ipynb")
    executed = tool.execute(tmp_path / "some.ipynb")
    assert [cell.execution_count for cell in executed.cells] == [1, None, 2]
    assert executed.cells[1].outputs == [] and executed.cells[2].outputs[0].data["text/plain"] == "4"


def test_every_figure_and_table_has_a_caption():
    """In figures/README.md, and for reports in captions.tex; tables have theirs in them."""
    folder = ROOT / "figures"
    table = (folder / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w[\w.]*)\.(?:png|tex)\)", table))
    there = {file.stem for suffix in ("png", "tex") for file in folder.glob(f"*.{suffix}")}
    assert linked == there - {"captions"}
    assert tool.captions(table) == (folder / "captions.tex").read_text(encoding="utf-8"), "make figures"
    assert r"\includegraphics[width=\linewidth]{{05_temperature_0.5}.pdf}" in tool.captions(table)
    for file in set(folder.glob("0*.tex")):
        assert r"\caption{" in file.read_text(encoding="utf-8")


def test_readme_links_lead_somewhere_and_nothing_is_left_to_fill_in():
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")):
        text = file.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (file.parent / link).exists(), f"{file.name}: {link}"
        assert not re.search(r"^@\w+$", text, flags=re.MULTILINE), file
    for path in PATHS + SOLUTIONS:
        assert not any(re.search(r"^@\w+$", cell.source, flags=re.MULTILINE) for cell in read(path).cells), path
