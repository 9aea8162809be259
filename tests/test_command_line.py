"""The command line as a user meets it: in processes of its own, with what it prints and leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf
from model_card import beyond_recipe, card

import oasis_vq as ovq
from oasis_vq import files, model_commands, phantom, training
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


def test_the_whole_path(tmp_path, monkeypatch, capsys):
    """From nothing to new brains with commands alone, in an empty folder; two of them in processes of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "gradient_slowdown", lambda policy: 17.2)
    half = ("--precision", "mixed_bfloat16")
    for words in (
        ("phantom", "--out", "slices", "--subjects", 6, "--image-size", 32),
        ("train-vqvae", "--data", "slices", "--recipe", "keras_io", "--image-size", 32, "--epochs", 2, "--out", "v"),
        ("train-prior", "--data", "slices", "--vqvae", "v", "--epochs", 2, "--out", "v-prior", *half),
        ("encode", "--data", "slices", "--vqvae", "v", "--out", "codes.npz"),
        ("reconstruct", "--data", "slices", "--vqvae", "v", "--out", "again.v1"),
        ("evaluate", "v", "--data", "slices"),
        ("evaluate", "v-prior", "--data", "slices"),
        ("generate", "--prior", "v-prior", "-n", 3, "--out", "new"),
    ):
        if words[0] not in ("train-vqvae", "generate"):
            assert main([str(word) for word in words]) == 0, capsys.readouterr().err
            assert ("17 times as long in mixed_bfloat16" in capsys.readouterr().out) == (half[0] in words)
            continue
        done = run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        # TensorFlow's native logs; before 2.21 its compiler, which generate uses, says a word that nothing stops
        assert words[0] == "generate" or "0000 00:00" not in done.stderr
        assert "E0000" not in done.stderr  # nor errors that are none: bfloat16 on a CPU without it
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names >= {"grid.png", "sample_00.png", "sample_01.png", "sample_02.png", "codes.npz", "provenance.json"}
    assert iio.imread(tmp_path / "new" / "sample_00.png").shape == (32, 32)
    assert {path.name for path in tmp_path.glob("again*")} == {"again.v1.png", "again.v1.pdf"}
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as codes:
        assert codes["codes"].shape == (6 * 32, 8, 8) and codes["codes"].dtype == np.int32
        assert {"slice_index", "label", "subject"} <= set(codes)
    metrics = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert {"ssim", "brain_ssim", "baselines", "intervals", "training_seconds"} <= set(metrics)
    assert 0 <= json.loads((tmp_path / "v-prior" / "metrics.json").read_text())["lesion_auroc"] <= 1
    for name, said in (("v", "all-black image scores"), ("v-prior", "nearest_training_distance")):
        text = card(Path(name), "Made-up people.", "one core")
        assert (
            said in text and "Made-up people." in text and f"--out {name}\n" in text and "Not for clinical use" in text
        )
        assert ("leave `--precision` out" in text) == (name == "v-prior")
        # The command that a card gives, given again, finds the model it is of.
        shutil.copytree("slices", "data/slices", dirs_exist_ok=True)
        own = next(line.split()[3:] for line in text.splitlines() if line.startswith("python -m oasis_vq train"))
        assert "--epochs" in own and main(own) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "v" / "config.json").read_text())
    changes = {"fit": "stretch", "flip_left_right": True, "width": 7, "precision": "mixed_bfloat16", "loss": "l1"}
    options, rest = beyond_recipe("VQVAE", record["config"] | changes)
    given = {"image-size 32", "fit stretch", "flip-left-right", "precision mixed_bfloat16", "epochs 2"}
    assert {option.strip() for option in options.split(" --")[1:]} == given
    assert set(rest.split(" and ")) == {"`width = 7`", "`loss = l1`"}
    words = ("train-vqvae", "--data", "slices", "--recipe", "keras_io", "--image-size", 32, "--epochs", 3, "--out", "v")
    capsys.readouterr()
    assert "epochs: 2, not 3" in fails(capsys, *words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error():
    """`--help | head`."""
    for words in (["train-vqvae", "--help"], ["recipes"]):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-m", "oasis_vq", *words], **pipes) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1


def test_what_a_recipe_says_of_copies_and_mirrors_can_be_changed_either_way(cohort, capsys, monkeypatch):
    configs = []
    monkeypatch.setattr(model_commands, "_train", lambda out, config, *_, **options: configs.append(config))
    for recipe, said, *words in (
        ("bce_search", (True, False)),
        ("bce_search", (False, True), "--no-upside-down-copies", "--flip-left-right"),
        ("keras_io", (False, False), "--no-flip-left-right"),
        ("keras_io", (True, False), "--upside-down-copies"),
    ):
        assert main(["train-vqvae", "--data", str(cohort), "--out", "v", "--recipe", recipe, *words]) == 0
        assert (configs[-1].upside_down_copies, configs[-1].flip_left_right) == said
    assert beyond_recipe("VQVAE", configs[1].to_dict())[0] == " --no-upside-down-copies --flip-left-right"
    capsys.readouterr()
    main(["train-vqvae", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--upside-down-copies, --no-upside-down-copies whether each slice" in told
    assert "upside down; None for the recipe's. (default: None)" in told


def test_samples_of_two_calls_are_never_mixed(models, prior, tmp_path, monkeypatch):
    """Not even if one is stopped: what vouches for the samples is of the same call, or is not there."""
    words = ["generate", "--prior", str(models / "small-prior"), "--out", str(tmp_path / "new")]

    def names():
        return {path.name for path in (tmp_path / "new").iterdir()}

    def stop(path, content):
        if path.name == "sample_02.png":
            raise KeyboardInterrupt
        path.write_bytes(content)

    beside = {"grid.png", "grid.pdf", "codes.npz", "provenance.json"}
    assert main([*words, "-n", "4"]) == 0 and names() == beside | {f"sample_0{number}.png" for number in range(4)}
    first = ovq.Codes.load(tmp_path / "new" / "codes.npz").codes
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_whole", stop)
        assert main([*words, "-n", "4", "--seed", "1"]) == 1
    assert names() == {"sample_00.png", "sample_01.png", "codes.npz"}
    assert (ovq.Codes.load(tmp_path / "new" / "codes.npz").codes != first).any()
    (tmp_path / "new" / "letter.txt").write_text("mine")
    assert main([*words, "-n", "1"]) == 0 and names() == beside | {"sample_00.png", "letter.txt"}


def test_help_does_not_wait_for_tensorflow():
    code = "import sys; from oasis_vq.__main__ import main; main(['--help']); assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ovq.recipe_names())
    row = out.split("\ndeep_residual")[1].splitlines()
    assert row[0].split()[:4] == ["256", "64x64", "512", "36,864"] and "SSIM 0.868" in row[1]
    assert int(row[0].split()[4].replace(",", "")) == pytest.approx(955_905, abs=1)


def test_wrong_words_are_one_line(capsys):
    assert "--out" in fails(capsys, "generate", "--prior", "x")
    assert fails(capsys, "generte").endswith("Help: python -m oasis_vq --help\n")
    said = fails(capsys, "prepare", "x", "--out", "y", "--slice-range", "0.5")
    assert "FLOAT FLOAT" in said and "[bold]" not in said and said.endswith("python -m oasis_vq prepare --help\n")
    assert "invalid" in fails(capsys, "phantom", "--out", "x", "--subjects", "many").lower()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, copied, models, prior, capsys):
    out, train = tmp_path / "out", ("train-vqvae", "--recipe", "keras_io", "--out", tmp_path / "out")
    assert "There is no folder" in fails(capsys, *train, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for command in ("encode", "reconstruct"):
        words = ("--data", copied, "--vqvae", models / "small", "--out", tmp_path / "empty")
        assert "empty, which is a folder" in fails(capsys, command, *words)
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
    assert "brain.png: it is named outside the layout" in fails(capsys, *train, "--data", copied)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("out", [".", ".."])
def test_what_has_no_name_of_its_own_is_no_folder_to_make(cohort, tmp_path, monkeypatch, capsys, out):
    here = tmp_path / "empty" / "deeper"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    told = f"such as ./new (--out). Received: {out}."
    assert told in fails(capsys, "train-vqvae", "--data", cohort, "--recipe", "keras_io", "--out", out)
    if out == ".":  # the other holds something, which is told
        assert told in fails(capsys, "phantom", "--out", out)
    assert list(tmp_path.rglob("*")) == [here.parent, here]


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "_write_subject", stop)
    assert main(["phantom", "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert capsys.readouterr().err.endswith("\nStopped. The same command again goes on from there.\n")


def test_check_says_what_is_there_and_what_is_wrong(cohort, copied, capsys):
    assert main(["check", str(cohort)]) == 0
    said = capsys.readouterr().out
    assert "train         48 files     6 subjects  slices 0-7" in said and "note   counts" in said
    assert said.endswith("usable, 2 notes\n")
    train = copied / "keras_png_slices_train"
    (train / "case_002_slice_3.nii.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (train / "case_003_slice_1.nii.png").write_bytes(b"")
    assert "cannot be used as it is: 2 errors above" in fails(capsys, "check", copied)
    main(["check", str(copied)])
    said = capsys.readouterr().out
    assert "error  pointer" in said and "case_002_slice_3" in said and "git lfs pull" in said
    assert "error  unreadable" in said and "case_003_slice_1" in said
    assert "1 error above" in fails(capsys, "check", copied / "nothing")


def test_training_goes_on_without_unreadable_slices_and_with_fewer_subjects_if_told(copied, tmp_path, capsys):
    (copied / "keras_png_slices_train" / "case_003_slice_1.nii.png").write_bytes(b"")
    words = ["train-vqvae", "--data", copied, "--recipe", "keras_io", "--image-size", 16, "--epochs", 1]
    words = [str(word) for word in [*words, "--out", tmp_path / "v", "--limit-train", 4]]
    while "case_003" not in " ".join(ovq.find_slices(copied, limit_train=int(words[-1])).train.path):
        words[-1] = str(int(words[-1]) + 1)
    assert "--skip-unreadable" in fails(capsys, *words)
    assert main([*words, "--skip-unreadable"]) == 0
    said = capsys.readouterr().out
    assert "case_003_slice_1.nii.png cannot be decoded: left out" in said
    record = json.loads((tmp_path / "v" / "config.json").read_text())
    assert record["data"]["num_train"] == 8 * int(words[-1]) - 1
    assert main(["evaluate", str(tmp_path / "v"), "--data", str(copied), "--skip-unreadable"]) == 0
    (tmp_path / "v").rename(tmp_path / "a model")
    text = card(tmp_path / "a model", "Made-up people.", "one core")
    assert f" --limit-train {words[-1]} --out '{tmp_path / 'a model'}'\n" in text


def test_adni_slices_from_check_to_a_sample_of_a_class(adni, models, prior, tmp_path, capsys):
    v, p, new = (str(tmp_path / name) for name in ("v", "v-prior", "new"))
    data = ("--data", str(adni))
    for words in (
        ("check", data[1]),
        ("train-vqvae", *data, "--recipe", "default128", "--image-size", "32", "--epochs", "1", "--out", v,
         "--fit", "stretch", "--flip-left-right", "--max-shift", "2", "--upside-down-copies", "--cache"),
        ("train-prior", *data, "--vqvae", v, "--recipe", "keras_io", "--condition-on", "slice_index", "label",
         "--epochs", "1", "--patience", "4", "--precision", "mixed_bfloat16", "--out", p),
        ("evaluate", v, *data, "--limit-train", "5"),
        ("generate", "--prior", p, "-n", "2", "--label", "AD", "--slice-index", "79", "--out", new),
    ):  # fmt: skip
        assert main(list(words)) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "v" / "config.json").read_text())["config"]
    assert (config["fit"], config["max_shift"], config["upside_down_copies"]) == ("stretch", 2, True)
    config = json.loads((tmp_path / "v-prior" / "config.json").read_text())["config"]
    assert (config["first_slice"], config["num_slices"], config["num_labels"]) == (78, 3, 2)
    assert config["precision"] == "mixed_bfloat16" and config["patience"] == 4
    with np.load(tmp_path / "new" / "codes.npz") as codes:
        assert codes["label"].tolist() == [1, 1] and codes["slice_index"].tolist() == [79, 79]
    provenance = json.loads((tmp_path / "new" / "provenance.json").read_text())
    known = provenance["models"]
    assert provenance["label"] == 1 and known["v-prior"]["vqvae"]["sha256"] == known["v"]["sha256"]
    assert provenance["packages"]["tensorflow"] == tf.__version__
    capsys.readouterr()
    told = fails(capsys, "generate", "--prior", models / "small-prior", "--label", "AD", "--out", new)
    assert "label is no condition of this prior" in told
    assert main(["generate", "--prior", p, "-n", "2", "--unconditional", "--out", new]) == 0
    with np.load(tmp_path / "new" / "codes.npz") as codes:
        assert codes["label"].tolist() == codes["slice_index"].tolist() == [-1, -1]
    told = fails(capsys, "generate", "--prior", p, "--unconditional", "--label", "AD", "--out", new)
    assert "--unconditional is without" in told


def test_download_wants_the_terms_accepted(tmp_path, capsys):
    done = run("download", "oasis1", "--out", tmp_path / "discs", "--discs", 1)
    assert done.returncode == 1 and "Marcus" in done.stdout and "--accept-terms" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "discs").exists()
    assert "1 to 12" in fails(
        capsys, "download", "oasis1", "--accept-terms", "--out", tmp_path / "discs", "--discs", 13
    )


def test_prepare_makes_what_check_finds_usable(tmp_path, capsys):
    (tmp_path / "volumes").mkdir()
    generator = np.random.default_rng(0)
    distance = np.sqrt(sum((axis / 30) ** 2 for axis in np.ogrid[-40:40, -40:40, -40:40]))
    for number in range(4):
        volume = np.where(distance < 0.9, 100 + 20 * generator.standard_normal((80, 80, 80)), 0)
        file = tmp_path / "volumes" / f"sub-{number:02d}_T1w.nii.gz"
        nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([2, 2, 2, 1])), file)
    words = ["prepare", tmp_path / "volumes", "--out", tmp_path / "slices", "--image-size", 64, "--num-slices", 3]
    assert main([str(word) for word in words]) == 0
    assert "12 slices" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "slices")]) == 0
    index = ovq.find_slices(tmp_path / "slices")
    assert [len(part) for part in index.splits().values()] == [6, 3, 3] and (tmp_path / "slices/manifest.csv").exists()
    assert "No volumes in" in fails(capsys, "prepare", tmp_path / "slices", "--out", tmp_path / "other")
