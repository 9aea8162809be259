"""What a model folder tells: scores belong to the slices they were made with."""

import dataclasses
import json

import numpy as np

import oasis_vq as ovq


def test_scores_of_other_slices_are_not_taken_for_theirs(vqvae, index):
    first = ovq.evaluate_model(vqvae.folder, index)
    file = vqvae.folder / "metrics.json"
    file.write_text(json.dumps({**first, "ssim": 0.123}))
    assert ovq.evaluate_model(vqvae.folder, index)["ssim"] == 0.123  # read, not computed
    assert ovq.evaluate_model(vqvae.folder, index, again=True) == first
    fewer = dataclasses.replace(index, test=index.test[np.arange(len(index.test)) % 2 == 0])
    other = ovq.evaluate_model(vqvae.folder, fewer)
    assert other["num_images"] == len(fewer.test) < first["num_images"]
    assert ovq.evaluate_model(vqvae.folder, index) == first


def test_texts_have_scores_alone(vqvae, index):
    (text,) = ovq.report_texts(ovq.evaluate_model(vqvae.folder, index))
    assert "brain_ssim" in text and "black" in text
    assert not any(word in text for word in ("scored_slices", "val_", "training_seconds"))
