"""Unusual slices: planted spots are where they say, and cost more bits than usual."""

import dataclasses

import numpy as np
import pytest
from conftest import PRIOR_CONFIG

import oasis_vq as ovq


@pytest.fixture(scope="module")
def prior(train, vqvae):
    """A gated one: what is unusual is told by a prior that has learned the usual well."""
    return train("gated", dataclasses.replace(PRIOR_CONFIG, architecture="gated"), vqvae=vqvae)


def test_lesions_are_planted_in_the_brain(index):
    images = ovq.load_images(index.test, image_size=32)
    images[0] = 0
    changed, spots = ovq.plant_lesions(images, seed=3)
    np.testing.assert_array_equal(changed[0], images[0])
    assert spots[0].max() == 0 and spots.min() == 0 and spots.max() == 1
    assert np.all((spots[1:] > 0).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed[spots == 0], images[spots == 0])
    assert not (spots[images <= 0.05] > 0).any() and changed.min() >= 0 and changed.max() <= 1
    np.testing.assert_array_equal(ovq.plant_lesions(images, seed=3)[0], changed)
    assert not np.array_equal(ovq.plant_lesions(images, seed=4)[0], changed)


def test_planted_lesions_surprise_the_prior_where_they_are(vqvae, prior, index):
    surprise = ovq.Surprise(prior, ovq.encode_slices(vqvae, index.validate))
    clean = ovq.encode_slices(vqvae, index.test)
    images = ovq.load_images(index.test, image_size=32)
    changed, spots = ovq.plant_lesions(images)
    planted = dataclasses.replace(clean, codes=vqvae.encode(changed))
    assert surprise.maps(clean).shape == clean.codes.shape
    assert surprise.scores(planted).mean() > surprise.scores(clean).mean() + 0.05
    difference = surprise.maps(planted) - surprise.maps(clean)
    touched = spots[..., 0].reshape(len(spots), 8, 4, 8, 4).max(axis=(2, 4)) > 0.5
    assert difference[touched].mean() > 2 * abs(difference[~touched].mean()) and difference[touched].mean() > 0.02


def test_planted_slices_are_ranked_among_clean_ones(vqvae, prior, index):
    found = ovq.find_lesions(prior, vqvae, index, num=50)
    count = len(found["scores"])
    assert count % 2 == 0 and 8 <= count <= 16 and found["planted"].sum() == count // 2
    assert found["images"].shape == found["spots"].shape == (count, 32, 32, 1)
    assert found["spots"][found["planted"]].any(axis=(1, 2, 3)).all() and not found["spots"][~found["planted"]].any()
    pairs = found["scores"][found["planted"]][:, None] > found["scores"][~found["planted"]]
    assert found["auroc"] == pytest.approx(pairs.mean())
    with pytest.raises(ValueError, match=r"at least 4 test slices with brain .* Received: 0, num=50"):
        ovq.find_lesions(prior, vqvae, dataclasses.replace(index, test=index.test[:0]))
