"""The models in the repository: they load, their cards tell their scores, and their samples are brains."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import oasis_vq as ovq
from oasis_vq import folders
from oasis_vq.__main__ import main
from oasis_vq.folders import read_record
from oasis_vq.quality import is_valid

FOLDER = Path(__file__).parents[1] / "saved_models"
NAMES = [
    f"{data}{level}{what}" for data in ("ixi128", "phantom256") for level in ("", "-coarse") for what in ("", "-prior")
]


@pytest.mark.parametrize("name", NAMES)
def test_card_tells_the_scores_and_the_terms(name):
    card, metrics = ((FOLDER / name / file).read_text() for file in ("README.md", "metrics.json"))
    of_draft = "coarse" in read_record(FOLDER / name)  # which shows a lesion already
    of_prior = ("bits_per_code", "classifier_accuracy", "coverage", "bits_per_image" if of_draft else "lesion_auroc")
    for score in of_prior if name.endswith("prior") else ("ssim", "brain_ssim"):
        assert any(line.split()[:2] == [score, f"{json.loads(metrics)[score]:.3f}"] for line in card.splitlines())
    terms = (
        ("CC BY-SA 3.0", "brain-development.org")
        if name.startswith("ixi")
        else ("MNI152", "python -m oasis_vq phantom")
    )
    assert all(term in card for term in (*terms, "Not for clinical use"))
    files = list((FOLDER / name).iterdir())
    assert all(file.stat().st_size < 15e6 for file in files) and not (FOLDER / name / "tensorboard").exists()


def test_models_are_small_and_good():
    sizes = [file.stat().st_size for name in NAMES for file in (FOLDER / name).rglob("*") if file.is_file()]
    assert sum(sizes) < 40e6
    metrics = {name: json.loads((FOLDER / name / "metrics.json").read_text()) for name in NAMES}
    assert metrics["ixi128-coarse-prior"]["lesion_auroc"] >= 0.8
    assert is_valid(metrics["ixi128-coarse-prior"]) and is_valid(metrics["ixi128-prior"])
    assert metrics["phantom256"]["brain_ssim"] > metrics["phantom256"]["baselines"]["mean_slice"]["brain_ssim"] + 0.5
    for name in (name for name in NAMES if name.endswith("prior")):
        samples, grid_shape = metrics[name], ovq.PriorConfig.from_dict(read_record(FOLDER / name)["config"]).grid_shape
        per_position = samples["baselines"]["per_position"] * math.prod(grid_shape)
        assert samples["bits_per_image"] < 0.8 * per_position
        assert samples["classifier_accuracy"] <= 0.75
        assert samples["coverage"] >= 0.7 * samples["ceiling"]["coverage"]


def assert_brains(images):
    part = images.shape[1] // 8
    corners = np.concatenate([images[:, :part, :part].ravel(), images[:, -part:, -part:].ravel()])
    assert corners.max() < 0.1 < images[:, 3 * part : 5 * part, 3 * part : 5 * part].mean()  # gray in the middle


def test_brains_are_generated_without_data(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "load_prior", functools.cache(folders.load_prior))  # compiled once for what follows
    assert main(["generate", "--prior", str(FOLDER / "ixi128-prior"), "-n", "16", "--out", str(tmp_path / "new")]) == 0
    with np.load(tmp_path / "new" / "codes.npz") as codes:
        drawn, positions = codes["codes"], codes["slice_index"]
    assert len(np.unique(drawn)) > 100 and len(np.unique(positions)) > 4
    # Again, from the parts. A second level refines the brains of the first.
    fine = folders.load_prior(FOLDER / "ixi128-prior")
    coarse = ovq.sample_codes(fine.drafter.prior, 16, seed=0, slice_index=positions)
    draft = fine.drafter.of_codes(coarse)
    order = np.argsort(positions)
    assert_refined(fine.drafter, coarse[order], drawn[order])
    bits = -fine.log_prob(drawn, slice_index=positions, draft=draft) / np.log(2) / drawn[0].size
    assert 0.5 < bits.mean() < 3  # what it draws is likely to it: guessing costs 9


@pytest.mark.slow
def test_a_second_level_refines_phantoms():
    fine = ovq.load_prior(FOLDER / "phantom256-prior")
    coarse, drawn = (ovq.sample_codes(prior, 4, seed=0, slice_index=16) for prior in (fine.drafter.prior, fine))
    assert_refined(fine.drafter, coarse, drawn)


def assert_refined(drafter, coarse, drawn):
    """Brains, more like what they refine than like what the one before does, which is at nearly the same height."""
    refined, below = drafter.fine.decode(drawn), drafter.coarse.decode(coarse)
    assert_brains(refined)
    own, other = (((refined[1:] - drafts) ** 2).mean() for drafts in (below[1:], below[:-1]))
    assert own < 0.5 * other
