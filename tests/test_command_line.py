"""The command line as a user meets it: in processes of its own, with what it prints and leaves behind."""

import json
import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

from oasis_vq.__main__ import COMMANDS, main


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "oasis_vq", *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False
    )


def fails(capsys, *words):
    """Run a command in this process; return its one line on stderr."""
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_the_whole_path(tmp_path):
    """From nothing to new brains with commands alone, in an empty folder."""
    for words in (
        ("phantom", "--out", "slices", "--subjects", 6, "--image-size", 32),
        ("train-vqvae", "--data", "slices", "--recipe", "keras_io", "--image-size", 32, "--epochs", 2, "--out", "v"),
        ("train-prior", "--data", "slices", "--vqvae", "v", "--epochs", 2, "--out", "v-prior"),
        ("encode", "--data", "slices", "--vqvae", "v", "--out", "codes.npz"),
        ("reconstruct", "--data", "slices", "--vqvae", "v", "--out", "again.png"),
        ("evaluate", "v", "--data", "slices"),
        ("evaluate", "v-prior", "--data", "slices"),
        ("generate", "--prior", "v-prior", "-n", 3, "--out", "new"),
    ):
        done = run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        # TensorFlow's native logs; before 2.21 its compiler, which generate uses, says a word that nothing stops
        assert words[0] == "generate" or "0000 00:00" not in done.stderr
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names >= {"grid.png", "sample_00.png", "sample_01.png", "sample_02.png", "codes.npz", "provenance.json"}
    assert iio.imread(tmp_path / "new" / "sample_00.png").shape == (32, 32)
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as codes:
        assert codes["codes"].shape == (6 * 32, 8, 8) and codes["codes"].dtype == np.int32
        assert {"slice_index", "label", "subject"} <= set(codes)
    metrics = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert {"ssim", "brain_ssim", "baselines", "intervals", "training_seconds"} <= set(metrics)
    again = run("train-vqvae", "--data", "slices", "--recipe", "keras_io", "--image-size", 32, "--epochs", 3,
                "--out", "v", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 1 and "epochs: 2, not 3" in again.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_help_does_not_wait_for_tensorflow():
    code = "import sys; from oasis_vq.__main__ import main; main(['--help']); assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("keras_io", "default128", "default256"))


def test_wrong_words_are_one_line(capsys):
    assert "--out" in fails(capsys, "generate", "--prior", "x")
    assert "generte" in fails(capsys, "generte")
    assert "invalid" in fails(capsys, "phantom", "--out", "x", "--subjects", "many").lower()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, copied, models, prior, capsys):
    out, train = tmp_path / "out", ("train-vqvae", "--recipe", "keras_io", "--out", tmp_path / "out")
    assert "No PNG slices in" in fails(capsys, *train, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "python -m oasis_vq phantom" in fails(capsys, *train, "--data", tmp_path / "empty")
    assert "multiple of downsampling (4)" in fails(capsys, *train, "--data", copied, "--image-size", 62)
    assert "A recipe is one of" in fails(capsys, *train[:1], *train[3:], "--data", copied, "--recipe", "best")
    assert "No config.json" in fails(capsys, "generate", "--prior", tmp_path / "nothing", "--out", out)
    assert "slice_index is in" in fails(
        capsys, "generate", "--prior", models / "small-prior", "--slice-index", 99, "--out", out
    )
    lonely = shutil.copytree(models / "small-prior", tmp_path / "lonely-prior")
    assert "No VQ-VAE in" in fails(capsys, "generate", "--prior", lonely, "--out", out)
    file = copied / "keras_png_slices_train" / "case_002_slice_3.nii.png"
    file.write_bytes(file.read_bytes()[:100])
    assert "case_002_slice_3.nii.png" in fails(capsys, *train, "--data", copied)
    assert "case_002_slice_3.nii.png" in fails(capsys, "evaluate", models / "small", "--data", copied)
    file.unlink()
    for command, name in (("encode", "codes.npz"), ("reconstruct", "figure.png")):
        words = ("--data", copied, "--vqvae", models / "x", "--out", out / "deep" / name)
        assert "No config.json" in fails(capsys, command, *words)
    alone = shutil.copytree(models / "small-prior", tmp_path / "alone" / "p")
    assert "whose codes the prior" in fails(capsys, "evaluate", alone, "--data", copied)
    file.write_bytes(b"")
    file.rename(file.with_name("brain.png"))
    assert "brain.png is named outside the layout" in fails(capsys, *train, "--data", copied)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
