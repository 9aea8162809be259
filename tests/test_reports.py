"""What a model folder tells: scores belong to the slices they were made with."""

import dataclasses
import json
import shutil
import subprocess

import pytest

import oasis_vq as ovq
from oasis_vq import reports
from oasis_vq.__main__ import main
from oasis_vq.evaluation import table
from oasis_vq.reports import validate_model


@pytest.fixture
def folder(vqvae, tmp_path):
    """A model folder to write into."""
    return shutil.copytree(vqvae.folder, tmp_path / "small")


def test_scores_of_other_slices_are_not_taken_for_theirs(folder, index):
    few, fewer = (dataclasses.replace(index, test=index.test[:num]) for num in (4, 2))
    first = ovq.evaluate_model(folder, few)
    (folder / "metrics.json").write_text(json.dumps({**first, "ssim": 0.123}))
    assert ovq.evaluate_model(folder, few)["ssim"] == 0.123  # read, not computed
    assert ovq.evaluate_model(folder, few, again=True) == first
    assert ovq.evaluate_model(folder, fewer)["num_images"] == 2
    assert ovq.evaluate_model(folder, few) == first


def test_validation_is_scored_and_nothing_written(folder, cohort, index, vqvae, prior, capsys):
    before = (folder / "metrics.json").read_bytes()
    assert main(["evaluate", str(folder), "--data", str(cohort), "--split", "validate"]) == 0
    report = ovq.evaluate_reconstruction(vqvae, index.validate, train=index.train)
    assert table(report) in capsys.readouterr().out and (folder / "metrics.json").read_bytes() == before
    own = validate_model(prior.folder, index)
    known = json.loads((prior.folder / "metrics.json").read_text())
    assert own["bits_per_code"] == pytest.approx(known["val_bits_per_code"], rel=1e-4)


def test_another_split_is_told(folder, index, capsys):
    ovq.evaluate_model(folder, index, again=True)
    assert "another split" not in capsys.readouterr().out
    kept = (folder / "metrics.json").read_bytes()
    moved = dataclasses.replace(index, test=index.validate, validate=index.test)
    assert ovq.evaluate_model(folder, moved)["num_images"] == len(index.validate)
    assert "was trained with another split (" in capsys.readouterr().out
    assert (folder / "metrics.json").read_bytes() == kept  # a model's own scores


def test_scores_that_are_none_are_no_error(folder, index):
    report = ovq.evaluate_model(folder, dataclasses.replace(index, test=index.test[:2]))
    nothing = {"brain_psnr": None, "intervals": report["intervals"] | {"brain_psnr": [None, None]}}
    nothing["baselines"] = report["baselines"] | {"black": {"ssim": 0.7, "brain_ssim": None}}
    nothing["positions"] = report["positions"] | {"model": {"brain_ssim": [None] * len(report["positions"]["slice"])}}
    (text,) = ovq.report_texts(report | nothing)
    assert next(line.split()[:5] for line in text.splitlines() if line.startswith("brain_psnr")) == [
        "brain_psnr",
        "-",
        "-",
        "to",
        "-",
    ]


def test_texts_have_scores_alone(folder, index):
    (text,) = ovq.report_texts(ovq.evaluate_model(folder, dataclasses.replace(index, test=index.test[:2])))
    assert "brain_ssim" in text and "black" in text
    assert not any(word in text for word in ("scored_slices", "val_", "training_seconds"))


@pytest.mark.slow
def test_samples_that_an_older_version_scored_are_scored_again(vqvae, prior, index, tmp_path):
    for model in (vqvae, prior):
        shutil.copytree(model.folder, tmp_path / model.folder.name)
    folder = tmp_path / prior.folder.name
    first = ovq.evaluate_model(folder, index)
    older = {name: value for name, value in first.items() if name not in ("copies", "scored_as")}
    (folder / "metrics.json").write_text(json.dumps(older))
    assert set(ovq.evaluate_model(folder, index)) == set(first)


def test_scores_beside_other_training_slices_are_not_taken_for_theirs(folder, index):
    """The baselines are of training slices."""
    first = ovq.evaluate_model(folder, index)
    fewer = ovq.evaluate_model(folder, dataclasses.replace(index, train=index.train[:8]))
    assert fewer["baselines"]["mean_slice"]["ssim"] != first["baselines"]["mean_slice"]["ssim"]


def test_commit_is_that_of_this_project_and_says_if_files_differ(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    inner = tmp_path / "site-packages"
    for root in (tmp_path, inner):
        (root / "oasis_vq").mkdir(parents=True)
        (root / "oasis_vq" / "a.py").write_text("1")
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    assert reports.commit() is None
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    clean = reports.commit()
    assert len(clean) == 40
    (tmp_path / "oasis_vq" / "new.py").write_text("2")
    assert reports.commit() == f"{clean}-dirty"
    monkeypatch.setattr(reports, "ROOT", inner)  # installed in somebody else's project
    assert reports.commit() is None
