"""Unusual slices: planted spots are where they say, and cost more bits than usual."""

import dataclasses

import numpy as np

import oasis_vq as ovq


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
    assert difference[touched].mean() > 2 * abs(difference[~touched].mean())
