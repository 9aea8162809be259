"""Scores of samples: each measure knows equal from different, and the floor lies below the ceiling."""

import dataclasses

import numpy as np
import pytest

import oasis_vq as ovq
from oasis_vq import quality
from oasis_vq.codes import Codes

GENERATOR = np.random.default_rng(0)


def test_frechet_distance_of_normal_distributions():
    features = GENERATOR.normal(size=(5000, 4))
    assert quality.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert quality.frechet_distance(features, features + np.array([1, 2, 0, 0])) == pytest.approx(5, abs=1e-6)
    # of normal distributions with standard deviations 1 and 3 in four dimensions: 4 (1 - 3)^2
    assert quality.frechet_distance(features, 3 * features) == pytest.approx(16, rel=0.05)


def test_density_and_coverage_count_neighbourhoods():
    real, alone = np.array([[0.0], [1.0], [2.0], [10.0]]), np.arange(4)  # with k = 1 the radii are 1, 1, 1, 8
    assert quality.density_and_coverage(real, np.array([[0.5]]), alone, k=1) == (2.0, 0.5)
    assert quality.density_and_coverage(real, np.array([[0.5], [100.0]]), alone, k=1) == (1.0, 0.5)
    of_two = np.array([0, 0, 0, 1])  # radii 10, 9, 8, 8
    assert quality.density_and_coverage(real, np.array([[-1.0]]), of_two, k=1) == (3.0, 0.75)
    many, others, alone = GENERATOR.normal(size=(500, 8)), GENERATOR.normal(size=(500, 8)), np.arange(500)
    density, coverage = quality.density_and_coverage(many, others, alone)
    assert density == pytest.approx(1, abs=0.15) and coverage > 0.9
    assert quality.density_and_coverage(many, np.zeros((500, 8)), alone)[1] < 0.5  # one mode, many times
    assert quality.density_and_coverage(many, many + 50, alone) == (0.0, 0.0)
    for owners in (np.zeros(500), np.repeat([0, 1], [497, 3])):  # nobody has five neighbours among other people
        assert np.isnan(quality.density_and_coverage(many, many + 50, owners)).all()


def test_slices_of_one_person_make_no_neighbourhood():
    """Fifty people with ten slices each that are nearly the same: other people like them must still be found there."""

    def slices():
        return np.repeat(GENERATOR.normal(size=(50, 3)), 10, axis=0) + 0.01 * GENERATOR.normal(size=(500, 3))

    people = np.repeat(np.arange(50), 10)
    density, coverage = quality.density_and_coverage(slices(), slices(), people)
    naive, _ = quality.density_and_coverage(slices(), slices(), np.arange(500))
    assert coverage > 0.4 and density > 0.7 and naive < 0.1


def test_most_similar_training_slice_and_its_distance(index):
    """Slices find themselves, also a little brighter; where there is room for it."""
    rows = np.array([5, 17, 30])
    images = ovq.load_images(index.train[rows], image_size=64)
    for brighter in (0.0, 0.05):
        found, distances = ovq.nearest_slices(images + brighter, index.train)
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_allclose(distances, brighter, atol=2e-3)


def test_histogram_samples_have_the_codes_of_their_position():
    train = GENERATOR.integers(0, 3, (4000, 2, 3)) + 10 * np.arange(6).reshape(2, 3)
    drawn = quality.histogram_samples(train, 4000, np.random.default_rng(1))
    np.testing.assert_array_equal(drawn // 10, np.broadcast_to(np.arange(6).reshape(2, 3), drawn.shape))
    assert np.abs(np.bincount(drawn[:, 1, 1] - 40) / 4000 - 1 / 3).max() < 0.04
    assert abs(np.corrcoef(drawn[:, 0, 0], drawn[:, 0, 1])[0, 1]) < 0.06  # each position for itself


def test_two_sample_accuracy_knows_equal_from_different():
    owners = np.repeat([f"person {number}" for number in range(16)], 16)
    images = GENERATOR.random((2, 256, 32, 32, 1)).astype(np.float32)
    equal = quality.two_sample_accuracy(*images, owners, owners, num_repeats=2)
    assert 0.4 < equal < 0.6
    spoiled = images[1].copy()
    spoiled[:, 8:16, 8:16] *= 0.3
    different = quality.two_sample_accuracy(images[0], spoiled, owners, owners, num_repeats=1)
    assert different > 0.95
    same = np.full(256, "one person")
    assert np.isnan(quality.two_sample_accuracy(*images, owners, same))


def test_images_of_one_person_are_not_learned_by_heart():
    """Every person has one image, many times: who they are must not help."""
    images = GENERATOR.random((32, 32, 32, 1)).astype(np.float32).repeat(16, axis=0)
    owners = np.repeat([f"person {number}" for number in range(32)], 16)
    accuracy = quality.two_sample_accuracy(images[:256], images[256:], owners[:256], owners[256:], num_repeats=4)
    assert 0.3 < accuracy < 0.7


def test_people_who_are_in_both_sets_are_in_the_same_half():
    """Else a classifier learns that they are of one set, and meets them again in the other."""
    people = GENERATOR.random((8, 32, 32, 1)).astype(np.float32)
    first, second = (people.repeat(12, axis=0) + 0.1 * GENERATOR.random((96, 32, 32, 1)) for _ in range(2))
    owners = np.repeat([f"person {number}" for number in range(8)], 12)
    assert 0.4 < quality.two_sample_accuracy(first, second, owners, owners, num_repeats=4) < 0.6


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("side", [32, 64, 96, 127, 160, 256])
def test_images_are_averaged_down_to_the_size_of_the_features(side, size):
    small = quality._averaged_down(np.full((1, side, side, 1), 0.3, np.float32), size)
    assert min(side, size) / 2 < small.shape[1] <= size
    np.testing.assert_allclose(small, 0.3, rtol=1e-6)


def test_diversity_is_that_of_the_images():
    of = Codes(*(np.zeros(0),) * 5)
    positions, people = np.tile(np.arange(4), 10), np.repeat([f"p{number}" for number in range(10)], 4)
    of = Codes(np.zeros((40, 1, 1)), positions, positions, people, people)
    same = np.tile(GENERATOR.random((4, 32, 32, 1)), (10, 1, 1, 1)).astype(np.float32)
    assert quality.diversity(same, of, np.random.default_rng(0)) == pytest.approx(0, abs=1e-5)
    mixed = (0.5 * same + 0.5 * GENERATOR.random((40, 32, 32, 1))).astype(np.float32)
    other = GENERATOR.random((40, 32, 32, 1)).astype(np.float32)
    less, more = (quality.diversity(images, of, np.random.default_rng(0)) for images in (mixed, other))
    assert 0.1 < less < more


def test_diversity_of_images_below_its_window_is_none():
    of = Codes(*(np.zeros(2, int) for _ in range(3)), np.array(["a", "b"]), np.array(["", ""]))
    assert np.isnan(quality.diversity(np.zeros((2, 8, 8, 1), np.float32), of, np.random.default_rng(0)))


def test_report_on_samples(vqvae, prior, index):
    report = ovq.evaluate_samples(prior, vqvae, index, num_repeats=1)
    measures = {"classifier_accuracy", "frechet_distance", "density", "coverage"}
    measures |= {"classifier_accuracy_whole", "diversity", "nearest_training_distance", "copy_like"}
    assert set(report) == measures | {"ceiling", "floor", "test", "copies", "distances"}
    for scores in ({name: report[name] for name in measures}, report["ceiling"], report["floor"]):
        assert set(scores) == measures
        assert all(isinstance(value, float) and np.isfinite(value) for value in scores.values())
    assert report["ceiling"]["frechet_distance"] < report["floor"]["frechet_distance"]
    assert report["ceiling"]["coverage"] >= report["floor"]["coverage"]
    assert report["ceiling"]["nearest_training_distance"] < report["floor"]["nearest_training_distance"]
    assert {name: len(values) for name, values in report["distances"].items()} == {
        "samples": len(index.test), "floor": len(index.test), "ceiling": len(index.validate), "test": len(index.test),
        "copies": len(index.test),
    }  # fmt: skip
    fewer = ovq.evaluate_samples(prior, vqvae, index, num=8, num_repeats=1)
    assert {len(values) for values in fewer["distances"].values()} == {8}
    np.testing.assert_equal(ovq.evaluate_samples(prior, vqvae, index, num=8, num_repeats=1), fewer)  # NaN among them
    text = quality.sample_table(report)
    assert f"{report['coverage']:.3f}" in text and "void" in text  # 16 images train no classifier


def test_a_prior_that_gives_training_slices_back_is_seen(vqvae, prior, index, monkeypatch):
    train = ovq.encode_slices(vqvae, index.train).codes
    monkeypatch.setattr(quality, "sample_codes", lambda prior, n, **options: np.resize(train, (n, *train.shape[1:])))
    report = ovq.evaluate_samples(prior, vqvae, index, num_repeats=1)
    assert report["copy_like"] > 0.8 and report["copy_like"] > report["test"]["copy_like"]
    assert report["nearest_training_distance"] == pytest.approx(report["copies"]["nearest_training_distance"], rel=0.2)


def test_ceiling_is_not_below_chance_where_two_sets_of_people_happen_to_be_alike():
    """Eight people from dark to bright, and eight others just so: who learns from dark ones finds bright ones left."""
    generator = np.random.default_rng(0)
    brightness = np.tile(np.linspace(0.2, 0.8, 8).repeat(16), 2)[:, None, None, None]
    images = np.clip(brightness + 0.05 * generator.standard_normal((256, 16, 16, 1)), 0, 1).astype(np.float32)
    people = np.array([f"p{number}" for number in range(16)]).repeat(16)
    fixed = quality.two_sample_accuracy(images[:128], images[128:], people[:128], people[128:])
    assert fixed < 0.4
    assert 0.42 < quality.ceiling_accuracy(images, images, people) < 0.58


def test_sets_that_share_people_are_told_apart_or_not_scored():
    """Where a half has nobody of a set there is no accuracy, rather than that of an untrained network."""
    images = GENERATOR.random((96, 32, 32, 1)).astype(np.float32)
    four, two = np.repeat(list("abcd"), 16), np.repeat(list("ab"), 16)
    assert quality.two_sample_accuracy(0.3 * images[:64], images[64:], four, two, num_repeats=4) > 0.95
    one_and_a_half = np.repeat(list("ae"), 16)
    assert np.isnan(quality.two_sample_accuracy(0.3 * images[:32], images[64:], two, one_and_a_half, num_repeats=1))


def test_one_test_slice_has_no_distance_between_distributions(vqvae, prior, index):
    tiny = dataclasses.replace(index, test=index.test[:1], train=index.train[:5])
    report = ovq.evaluate_samples(prior, vqvae, tiny, num_repeats=1)
    assert np.isnan(report["frechet_distance"]) and np.isnan(report["coverage"])
    assert report["nearest_training_distance"] > 0
