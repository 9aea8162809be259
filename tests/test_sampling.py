"""The sampler: the cached steps equal the full network, and the draws are what was asked for."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_pixelcnn import ARCHITECTURES, SMALL, randomised, some_codes

import oasis_vq as ovq
from oasis_vq import sampling


@tf.function(jit_compile=True)
def along_the_way(prior, codes, condition, draft):
    """Codes (b, h, w), and the logits (h * w, b, k) that the sampler sees on its way through them."""
    size, height, width = codes.shape
    flat = tf.transpose(tf.reshape(codes, (size, height * width)))

    def follow(index, logits, seen):
        return flat[index], tf.tensor_scatter_nd_update(seen, [[index]], logits[None])

    seen = tf.zeros((*flat.shape, prior.config.num_embeddings))
    caches = sampling.empty_caches(prior, size)
    given, nothing = (condition, prior.places(draft)), tf.zeros_like(codes)
    taken, _, seen = sampling.in_raster_order(prior, given, follow, seen, (0, height), nothing, caches)
    return taken, seen


def cached_logits(prior, codes, draft=None, **conditions):
    given = {name: tf.constant(values) for name, values in prior.checked_conditions(len(codes), **conditions).items()}
    condition = prior.condition_vector(len(codes), given)
    draft = None if draft is None else tf.constant(draft, tf.int32)
    taken, logits = along_the_way(prior, tf.constant(codes, tf.int32), condition, draft)
    np.testing.assert_array_equal(taken, codes)
    return logits.numpy().transpose(1, 0, 2).reshape(*codes.shape, -1)


@pytest.mark.parametrize(
    ("name", "conditioned"), [*((name, True) for name in ARCHITECTURES), ("default", False), ("gated_attentive", False)]
)
def test_cached_logits_equal_the_full_forward(name, conditioned):
    config = ARCHITECTURES[name]
    prior, codes = randomised(config), some_codes(config, 3)
    given = {"slice_index": 2, "label": 1} if conditioned else {}
    given = {condition: value for condition, value in given.items() if condition in prior.condition_sizes}
    full = prior.logits(codes, **given)
    assert full.std() > 0.1
    np.testing.assert_allclose(cached_logits(prior, codes, **given), full, atol=1e-4)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_half_precision_learns_and_its_cached_logits_equal_the_full_forward(precision):
    """Half precision has 8 or 11 bits, and rounds elsewhere in the two."""
    config = dataclasses.replace(ARCHITECTURES["gated_attentive"], precision=precision)
    prior, codes = randomised(config), some_codes(config, 16)
    assert {weight.dtype for weight in prior.trainable_weights} == {"float32"}
    full, exact = prior.logits(codes), randomised(ARCHITECTURES["gated_attentive"]).logits(codes)
    assert full.dtype == np.float32 and 0 < np.abs(full - exact).max() < 0.2
    np.testing.assert_allclose(cached_logits(prior, codes), full, atol=0.1)
    prior.compile(keras.optimizers.Adam(0.01))
    bits = prior.fit({"codes": codes}, epochs=30, batch_size=16, verbose=0).history["bits_per_code"]
    assert bits[-1] < 0.8 * bits[0]
    assert ovq.sample_codes(prior, 2).max() < config.num_embeddings
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("name", ["default", "gated_attentive"])
def test_cached_and_naive_sampling_give_the_same_codes_on_8x8(name):
    prior = randomised(dataclasses.replace(ARCHITECTURES[name], grid_shape=(8, 8), num_embeddings=32))
    options = {"seed": 5, "slice_index": 1}
    cached = ovq.sample_codes(prior, 20, **options)
    np.testing.assert_array_equal(cached, ovq.sample_codes(prior, 20, **options, cached=False))
    assert len(np.unique(cached)) > 8


def test_sampled_codes_follow_the_model():
    """2,000 draws of a 2x2 grid of 2 codes against the enumerated probabilities of all 16."""
    config = dataclasses.replace(SMALL, grid_shape=(2, 2), num_embeddings=2, num_slices=0, num_labels=0)
    prior = randomised(config, scale=0.5)
    grids = np.array([[int(bit) for bit in f"{number:04b}"] for number in range(16)]).reshape(16, 2, 2)
    expected = np.exp(prior.log_prob(grids))
    drawn = ovq.sample_codes(prior, 2000, seed=1).reshape(2000, 4) @ [8, 4, 2, 1]
    share = np.bincount(drawn, minlength=16) / 2000
    assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3)
    assert expected.max() - expected.min() > 0.05


def test_same_seed_same_sample_whatever_n():
    prior = randomised(SMALL)
    many = ovq.sample_codes(prior, 40, seed=3)
    np.testing.assert_array_equal(ovq.sample_codes(prior, 40, seed=3), many)
    for count in (1, 7, 16, 17):
        np.testing.assert_array_equal(ovq.sample_codes(prior, count, seed=3), many[:count])
    assert len(np.unique(many.reshape(40, -1), axis=0)) == 40  # no chunk and no row repeats another
    assert not np.array_equal(ovq.sample_codes(prior, 4, seed=4), many[:4])
    conditions = sampling.sample_conditions(prior, 40, seed=3)
    np.testing.assert_array_equal(
        sampling.sample_conditions(prior, 5, seed=3)["slice_index"], conditions["slice_index"][:5]
    )
    np.testing.assert_array_equal(ovq.sample_codes(prior, 40, seed=3, **conditions), many)
    assert set(conditions["slice_index"]) == {0, 1, 2} and set(conditions["label"]) == {0, 1}


def test_bands_and_chunks_of_a_large_grid_change_nothing(monkeypatch, capsys):
    prior = randomised(dataclasses.replace(ARCHITECTURES["gated"], grid_shape=(7, 5)))
    whole = ovq.sample_codes(prior, 5, seed=3, slice_index=1, label=0)
    assert "band" not in capsys.readouterr().err
    monkeypatch.setattr(sampling, "BAND_SIZE", 12)  # two rows a band, and four samples a chunk
    banded = ovq.sample_codes(prior, 5, seed=3, slice_index=1, label=0)
    assert "/8 " in capsys.readouterr().err
    np.testing.assert_array_equal(banded, ovq.sample_codes(prior, 5, seed=3, slice_index=1, label=0, cached=False))
    assert whole.shape == banded.shape == (5, 7, 5)
    np.testing.assert_array_equal(ovq.sample_codes(prior, 2, seed=3, slice_index=1, label=0), banded[:2])


def test_reloaded_prior_draws_the_same(models, prior):
    again = ovq.load_prior(models / "small-prior")
    np.testing.assert_array_equal(ovq.sample_codes(again, 3, seed=2), ovq.sample_codes(prior, 3, seed=2))


def test_prefix_is_kept_and_completed_from_the_same_draws():
    prior, codes = randomised(SMALL), some_codes(SMALL, 3)
    whole = ovq.sample_codes(prior, 3, seed=0, slice_index=1, label=0)
    np.testing.assert_array_equal(
        ovq.sample_codes(prior, 3, seed=0, slice_index=1, label=0, prefix=whole[:, :2]), whole
    )
    completed = ovq.sample_codes(prior, 3, seed=0, slice_index=1, label=0, prefix=codes[:, :2])
    np.testing.assert_array_equal(completed[:, :2], codes[:, :2])
    assert not np.array_equal(completed[:, 2:], codes[:, 2:])
    assert not np.array_equal(completed[:, 2:], whole[:, 2:])  # the rows that are drawn hear the given ones
    options = {"seed": 0, "slice_index": 1, "label": 0, "prefix": codes[:, :2]}
    np.testing.assert_array_equal(completed, ovq.sample_codes(prior, 3, **options, cached=False))
    likeliest = ovq.sample_codes(prior, 3, **options, top_k=1)
    follows = prior.logits(likeliest, slice_index=1, label=0).argmax(axis=-1)
    np.testing.assert_array_equal(likeliest[:, 2:], follows[:, 2:])
    np.testing.assert_array_equal(ovq.sample_codes(prior, 2, prefix=codes[0])[1], codes[0])


@pytest.mark.parametrize(
    ("policy", "name"),
    [("mixed_bfloat16", "default"), ("mixed_float16", "gated"), ("mixed_bfloat16", "gated_attentive")],
)
def test_sampling_under_mixed_precision(policy, name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        prior = randomised(ARCHITECTURES[name])
        codes = ovq.sample_codes(prior, 4, seed=0)
        np.testing.assert_array_equal(codes[:2], ovq.sample_codes(prior, 2, seed=0))
        assert len(np.unique(codes)) > 2 and prior.logits(codes).dtype == np.float32
    finally:
        keras.config.set_dtype_policy(before)


def test_temperature_top_k_and_top_p():
    prior = randomised(SMALL)
    cold = ovq.sample_codes(prior, 4, temperature=1e-4, slice_index=0, label=0)
    greedy = ovq.sample_codes(prior, 4, top_k=1, slice_index=0, label=0)
    np.testing.assert_array_equal(cold, greedy)
    np.testing.assert_array_equal(greedy, ovq.sample_codes(prior, 4, top_p=1e-6, slice_index=0, label=0))
    assert np.all(greedy == greedy[0])
    best = prior.logits(greedy, slice_index=0, label=0).argmax(-1)
    np.testing.assert_array_equal(greedy, best)
    np.testing.assert_array_equal(
        ovq.sample_codes(prior, 4, seed=1, top_k=7), ovq.sample_codes(prior, 4, seed=1, top_p=1)
    )


def test_filters_keep_what_their_definition_says():
    logits = np.log([[0.5, 0.05, 0.3, 0.15], [0.25, 0.25, 0.25, 0.25]]).astype(np.float32)

    def kept(top_k=4, top_p=1.0):
        values = sampling.filter_logits(tf.constant(logits), top_k=tf.constant(top_k), top_p=tf.constant(top_p))
        return np.isfinite(values.numpy()).tolist()

    assert kept()[0] == [True] * 4
    assert kept(top_k=2)[0] == [True, False, True, False]
    assert kept(top_p=0.49)[0] == [True, False, False, False]
    assert kept(top_p=0.51)[0] == [True, False, True, False]
    assert kept(top_p=0.81)[0] == [True, False, True, True]
    assert kept(top_k=2, top_p=0.6)[0] == [True, False, False, False]  # top_p counts within the top k: 0.5 of 0.8


def test_arguments_out_of_range_are_told():
    prior, codes = randomised(SMALL), some_codes(SMALL, 3)
    for options, text in [
        ({"temperature": 0}, "at least 1 and 1e-6"), ({"temperature": np.nan}, "temperature=nan"),
        ({"temperature": 1e-38}, "temperature=1e-38"), ({"seed": 2**63}, "seed is from"),
        ({"slice_index": 1.5}, r"slice_index is a whole number, or \(3,\) of them. Received: \(\) float64"),
        ({"slice_index": [0, 1]}, r"Received: \(2,\)"), ({"slice_index": 2**32}, r"slice_index is in \[0, 3\)"),
        ({"top_k": 0}, "top_k is from 1 to 7. Received: 0"),
        ({"top_k": 8}, "top_k is from 1 to 7"), ({"top_p": 0.0}, "top_p is above 0"), ({"top_p": 1.5}, "at most 1"),
        ({"slice_index": 9}, r"slice_index is in \[0, 3\)"), ({"prefix": codes[:2]}, "prefix is"),
        ({"prefix": codes[:, :, :2]}, "Codes are"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            ovq.sample_codes(prior, 3, **options)


@pytest.mark.gpu
def test_sampler_is_compiled_on_the_gpu():
    prior, size = randomised(SMALL), sampling.CHUNK_SIZE
    known, conditions = (
        tf.zeros((size, 4, 5), tf.int32),
        {name: tf.zeros(size, tf.int32) for name in prior.condition_sizes},
    )
    arguments = (known, conditions, tf.constant(0), tf.constant([0, 1]), tf.constant(1.0), None)
    cached, full = (
        sampling._sample_band(prior, tf.constant((0, 4)), known, caches, *arguments, way)[0]
        for caches, way in ((sampling.empty_caches(prior, size), True), ([], False))
    )
    assert "GPU" in cached.device
    np.testing.assert_array_equal(cached, full)


def test_slice_positions_without_training_slices_are_not_drawn(index):
    """Every third slice is left out, and the highest is of test people alone."""
    kept = (index.train.slice % 3 > 0) & (index.train.slice < 7)
    config = SMALL.conditioned_by(dataclasses.replace(index, train=index.train[kept]))
    assert (config.first_slice, config.num_slices, config.skipped_slices) == (0, 8, (0, 3, 6, 7))
    prior = randomised(config)
    drawn = sampling.sample_conditions(prior, 60)["slice_index"]
    assert set(drawn.tolist()) == {1, 2, 4, 5}
    np.testing.assert_array_equal(drawn[:5], sampling.sample_conditions(prior, 5)["slice_index"])
    known = prior.known_conditions(np.arange(-1, 9), np.zeros(10, int))["slice_index"]
    assert known.tolist() == [-1, -1, 1, 2, -1, 4, 5, -1, -1, -1]
    with pytest.raises(ValueError, match=r"slice_index is in \[0, 8\) without \[0, 3, 6, 7\], or -1 for unknown. Rec"):
        ovq.sample_codes(prior, 1, slice_index=3)
