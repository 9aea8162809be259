"""Tables: every cell arrives, in Markdown and in LaTeX, and nothing in it is taken for a command."""

import shutil
import subprocess

import pytest

import oasis_vq as ovq

ROWS = [{"system": "a_b", "brain_ssim": "0.5 & more"}, {"system": "50%", "brain_ssim": "0.6"}]


def test_markdown():
    assert ovq.markdown_table(ROWS) == ("| system | brain_ssim |\n| --- | --- |\n| a_b | 0.5 & more |\n| 50% | 0.6 |\n")


def test_latex_escapes_commands():
    text = ovq.latex_table(ROWS, widths={"brain_ssim": "6cm"})
    assert r"\begin{tabular}{lp{6cm}}" in text and r"a\_b & 0.5 \& more \\" in text and r"50\% & 0.6 \\" in text
    assert r"system & brain\_ssim \\" in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="LaTeX is not installed")
def test_latex_compiles_and_a_wide_table_fits(tmp_path):
    wide = [{f"column {number}": "a long text" for number in range(12)}]
    ovq.save_table(wide, "wide", caption="Wide: 100 % & more.", folder=tmp_path)
    ovq.save_table(ROWS, "narrow", caption="Narrow.", folder=tmp_path)
    (tmp_path / "report.tex").write_text(
        r"\documentclass{article}\usepackage{graphicx,booktabs}\begin{document}\input{wide}\input{narrow}\end{document}"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "Output written" in said and "Overfull" not in said


def test_saved_with_caption_and_the_same_bytes_again(tmp_path):
    files = {}
    for folder in ("once", "again"):
        ovq.save_table(ROWS, "06_scores", caption="Scores of 16 people, 95 % intervals.", folder=tmp_path / folder)
        files[folder] = {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
    assert files["once"] == files["again"] and set(files["once"]) == {"06_scores.md", "06_scores.tex"}
    text = files["once"]["06_scores.tex"].decode()
    assert r"\caption{Scores of 16 people, 95 \% intervals.}" in text and r"\label{tab:06_scores}" in text


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "at least one row"), ([{"a": "1"}, {"b": "2"}], r"columns \['a'\]. Received: \['b'\]")],
)
def test_impossible_tables(rows, message):
    with pytest.raises(ValueError, match=message):
        ovq.markdown_table(rows)
