"""The models in the repository: they load, their cards tell their scores, and their samples are brains."""

import json
from pathlib import Path

import numpy as np
import pytest

import oasis_vq as ovq
from oasis_vq.__main__ import main

FOLDER = Path(__file__).parents[1] / "saved_models"


@pytest.mark.parametrize("name", ["ixi128", "ixi128-prior"])
def test_card_tells_the_scores_and_the_terms(name):
    card, metrics = ((FOLDER / name / file).read_text() for file in ("README.md", "metrics.json"))
    for score in ("ssim", "brain_ssim") if name == "ixi128" else ("bits_per_code", "classifier_accuracy", "coverage"):
        assert any(line.split()[:2] == [score, f"{json.loads(metrics)[score]:.3f}"] for line in card.splitlines())
    assert "CC BY-SA 3.0" in card and "brain-development.org" in card and "Not for clinical use" in card
    files = list((FOLDER / name).iterdir())
    assert all(file.stat().st_size < 15e6 for file in files) and not (FOLDER / name / "tensorboard").exists()


def test_brains_are_generated_without_data(tmp_path):
    assert main(["generate", "--prior", str(FOLDER / "ixi128-prior"), "-n", "16", "--out", str(tmp_path / "new")]) == 0
    with np.load(tmp_path / "new" / "codes.npz") as codes:
        drawn, positions = codes["codes"], codes["slice_index"]
    assert len(np.unique(drawn)) > 100 and len(np.unique(positions)) > 4
    brains = ovq.load_vqvae(FOLDER / "ixi128").decode(drawn)
    corners = np.concatenate([brains[:, :16, :16].ravel(), brains[:, -16:, -16:].ravel()])
    assert corners.max() < 0.1 < brains[:, 48:80, 48:80].mean()  # dark around, gray in the middle
    prior = ovq.load_prior(FOLDER / "ixi128-prior")
    bits = -prior.log_prob(drawn, slice_index=positions) / np.log(2) / drawn[0].size
    assert 1 < bits.mean() < 5  # what it draws is likely to it: guessing costs 9
