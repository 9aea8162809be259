"""The prior: what it may see, that its probabilities are probabilities, and that it learns."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PRIOR_CONFIG

import oasis_vq as ovq

SMALL = dataclasses.replace(
    PRIOR_CONFIG, grid_shape=(4, 5), num_embeddings=7, num_slices=3, num_labels=2, num_head_layers=1
)
ARCHITECTURES = {
    "default": SMALL,
    "plain": dataclasses.replace(SMALL, num_slices=0, num_labels=0, learned_position=False, num_head_layers=2),
    "wide": dataclasses.replace(SMALL, first_kernel_size=7, kernel_size=5, num_residual_blocks=3),
    "one_by_one": dataclasses.replace(SMALL, first_kernel_size=3, kernel_size=1),
    "attentive": dataclasses.replace(SMALL, num_residual_blocks=3, num_attention_layers=2),
    "gated": dataclasses.replace(SMALL, architecture="gated"),
    "gated_plain": dataclasses.replace(
        SMALL, architecture="gated", num_slices=0, num_labels=0, learned_position=False, num_head_layers=0
    ),
    "gated_wide": dataclasses.replace(SMALL, architecture="gated", first_kernel_size=7, kernel_size=5),
    "gated_one_by_one": dataclasses.replace(SMALL, architecture="gated", first_kernel_size=3, kernel_size=1),
    "gated_attentive": dataclasses.replace(
        SMALL, architecture="gated", num_residual_blocks=2, num_attention_layers=1, num_attention_heads=2
    ),
}


def randomised(config, seed=0, scale=0.2):
    """A prior whose every weight matters: biases and positions too are drawn at random."""
    keras.utils.set_random_seed(seed)
    prior = ovq.PixelCNN(config)
    generator = np.random.default_rng(seed)
    for weight in prior.trainable_weights:
        weight.assign(weight + scale * generator.normal(size=weight.shape))
    return prior


def some_codes(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.num_embeddings, (count, *config.grid_shape))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_a_code_changes_no_logit_at_or_before_it(name):
    config = ARCHITECTURES[name]
    prior, size = randomised(config), int(np.prod(config.grid_shape))
    codes = some_codes(config, 1)
    before = prior.logits(codes).reshape(size, -1)
    for position in range(size):
        changed = codes.copy().reshape(-1)
        changed[position] = (changed[position] + 1) % config.num_embeddings
        after = prior.logits(changed.reshape(codes.shape)).reshape(size, -1)
        np.testing.assert_array_equal(after[: position + 1], before[: position + 1])
        if (position + 1) % config.grid_shape[1]:  # the next in the same row sees it
            assert not np.array_equal(after[position + 1], before[position + 1])


def influence(prior, row, column):
    """Whether each code of the grid changes the logits at a position: (h, w) bool, from input gradients."""
    vectors = prior.code_embedding(tf.constant(some_codes(prior.config, 1)))
    condition, position = prior.condition_vector(1, {}), prior.places()
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        heard = prior.down(vectors, condition, position)
        total = tf.reduce_sum(prior.along(vectors, heard, condition, position)[0, row, column] ** 2)
    return np.abs(tape.gradient(total, vectors)[0].numpy()).max(axis=-1) > 0


def test_prior_without_conditions_has_no_weight_that_does_nothing():
    prior = randomised(ARCHITECTURES["plain"])
    codes = tf.constant(some_codes(prior.config, 8), tf.int32)
    with tf.GradientTape() as tape:
        logits = prior({"codes": codes})
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(codes, logits))
    gradients = tape.gradient(loss, prior.trainable_variables)
    assert all(np.abs(tf.convert_to_tensor(gradient)).max() > 0 for gradient in gradients)


def test_verbs_take_fewer_grids_at_once_the_wider_the_layers():
    few = dataclasses.replace(SMALL, grid_shape=(256, 256), num_embeddings=10, num_channels=128)
    assert ovq.PixelCNN(few).verb_batch_size == 4
    assert ovq.PixelCNN(dataclasses.replace(few, num_channels=16)).verb_batch_size == 32


@pytest.mark.parametrize("blocks", [1, 3])
def test_gated_stacks_see_their_whole_receptive_field(blocks):
    config = dataclasses.replace(
        SMALL, architecture="gated", grid_shape=(9, 11), first_kernel_size=5, num_residual_blocks=blocks
    )
    prior = randomised(config)
    row, column = 7, 5
    rows, columns = np.mgrid[:9, :11]
    up, aside = prior.receptive_field
    past = (rows < row) | (rows == row) & (columns < column)
    expected = past & (row - rows <= up) & (np.abs(columns - column) <= aside)
    np.testing.assert_array_equal(influence(prior, row, column), expected)


def test_one_masked_stack_has_a_blind_spot_and_attention_sees_past_it():
    config = dataclasses.replace(SMALL, grid_shape=(9, 11), first_kernel_size=3, kernel_size=3, num_residual_blocks=5)
    past = np.zeros((9, 11), bool)
    past[:6], past[6, :2] = True, True
    plain = influence(randomised(config), 6, 2)
    assert not plain[~past].any() and not plain[5, 5] and plain[5, 3]  # three up to the right of it: out of sight
    attentive = randomised(dataclasses.replace(config, num_attention_layers=1))
    past[5, 10] = False  # the one code that no position up to (6, 2) has seen
    np.testing.assert_array_equal(influence(attentive, 6, 2), past)
    assert attentive.receptive_field == (9, 11)


def test_summary_compares_the_receptive_field_with_the_grid():
    small = {"grid_shape": (7, 7), "first_kernel_size": 5}
    for more, expected in (
        ({"architecture": "gated", "num_residual_blocks": 4},
         "sees 6 rows up and 6 columns to each side; the grid is 7x7: all of it."),
        ({"architecture": "gated", "num_residual_blocks": 3}, "the grid is 7x7. Larger kernels, more blocks or"),
        ({"num_residual_blocks": 4}, "the grid is 7x7, and to the upper right is a blind spot"),
        ({"num_residual_blocks": 4, "num_attention_layers": 1}, "all of it."),
        ({"num_residual_blocks": 3, "num_attention_layers": 1},
         "all of it, but for the last code of the row above where that is over 5 columns away."),
    ):  # fmt: skip
        prior = randomised(dataclasses.replace(SMALL, **small, **more))
        lines = []
        prior.summary(print_fn=lines.append)
        assert expected in lines[-1] and prior.sees_all == ("all of it" in lines[-1])
        if not prior.attention:  # from the first column of a row its blind spot is the widest
            past = np.arange(49).reshape(7, 7) < 14
            assert influence(prior, 2, 0)[past].all() == prior.sees_all


@pytest.mark.parametrize("name", [name for name, config in ARCHITECTURES.items() if config.num_slices])
def test_every_weight_is_trained(name):
    prior = randomised(ARCHITECTURES[name])
    codes = tf.constant(some_codes(prior.config, 4))
    given = {key: tf.constant([0, 1, 1, -1]) for key in prior.condition_sizes}
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(prior({"codes": codes, **given}) ** 2)
    for weight, gradient in zip(
        prior.trainable_weights, tape.gradient(loss, [w.value for w in prior.trainable_weights]), strict=True
    ):
        assert gradient is not None and np.abs(tf.convert_to_tensor(gradient)).max() > 0, weight.path


def test_mask_holds_after_training_steps():
    prior = randomised(SMALL)
    prior.compile("adam", run_eagerly=True)  # three steps: tracing one would take longer
    codes = some_codes(SMALL, 8)
    prior.fit({"codes": codes}, epochs=3, verbose=0)
    before = prior.logits(codes[:1])
    changed = codes[:1].copy()
    changed[0, 2, 2] = (changed[0, 2, 2] + 1) % SMALL.num_embeddings
    np.testing.assert_array_equal(prior.logits(changed)[0, :2], before[0, :2])
    np.testing.assert_array_equal(prior.logits(changed)[0, 2, :3], before[0, 2, :3])


def test_masked_convolution_equals_numpy():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, 6, 3)).astype(np.float32)
    for mask_type, kernel_size in itertools.product("AB", (3, 5)):
        layer = ovq.MaskedConv2D(4, kernel_size, mask_type=mask_type)
        layer.build(x.shape)
        layer.bias.assign(generator.normal(size=4))
        kernel, radius = layer.kernel.numpy(), kernel_size // 2
        expected = np.zeros((2, 5, 6, 4))
        for row, column in itertools.product(range(5), range(6)):
            for up, right in itertools.product(range(-radius, radius + 1), repeat=2):
                past = up < 0 or (up == 0 and right < 0) or (mask_type == "B" and up == right == 0)
                if past and row + up >= 0 and 0 <= column + right < 6:
                    expected[:, row, column] += x[:, row + up, column + right] @ kernel[up + radius, right + radius]
        np.testing.assert_allclose(layer(x), expected + layer.bias.numpy(), atol=1e-5)


def test_residual_block_equals_numpy():
    """With a masked convolution of 1x1, which is a matrix: a ReLU after each layer, and the condition in the first."""
    block, generator = ovq.ResidualBlock(6, 1), np.random.default_rng(0)
    x, condition = (generator.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, 6), (2, 1, 1, 6)))
    block.build(x.shape)
    for weight in block.trainable_weights:
        weight.assign(generator.normal(size=weight.shape))
    first, given, masked, last = (
        [weight.numpy().reshape(-1, weight.shape[-1]) for weight in layer.weights]
        for layer in (block.before, block.condition, block.masked, block.after)
    )
    hidden = np.maximum(x @ first[0] + condition @ given[0] + first[1], 0)
    hidden = np.maximum(hidden @ masked[0] + masked[1], 0)
    expected = x + np.maximum(hidden @ last[0] + last[1], 0)
    assert masked[0].shape == (6, 3)
    np.testing.assert_allclose(block(x, condition), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_of_all_grids_sum_to_one():
    config = dataclasses.replace(SMALL, grid_shape=(2, 2), num_embeddings=2)
    grids = np.array(list(itertools.product((0, 1), repeat=4))).reshape(16, 2, 2)
    for condition in ({}, {"slice_index": 1, "label": 0}):
        probabilities = np.exp(randomised(config).log_prob(grids, **condition).astype(np.float64))
        assert probabilities.sum() == pytest.approx(1, abs=1e-5) and probabilities.std() > 0.001


def test_log_prob_is_the_sum_over_positions():
    prior, codes = randomised(SMALL), some_codes(SMALL, 70)  # more than one batch of the verbs
    log_softmax = tf.nn.log_softmax(prior.logits(codes, slice_index=1)).numpy()
    expected = np.take_along_axis(log_softmax, codes[..., None], -1).sum((1, 2, 3))
    np.testing.assert_allclose(prior.log_prob(codes, slice_index=1), expected, rtol=1e-5)
    prior.compile("adam")
    scores = prior.evaluate({"codes": codes, "slice_index": np.ones(70, int)}, return_dict=True, verbose=0)
    assert scores["bits_per_code"] == pytest.approx(-expected.mean() / 20 / np.log(2), rel=1e-5)
    assert scores["accuracy"] == pytest.approx((log_softmax.argmax(-1) == codes).mean())


def test_conditions_matter_and_unknown_is_a_condition_too():
    prior, codes = randomised(SMALL), some_codes(SMALL, 2)
    given = [prior.logits(codes, slice_index=1), prior.logits(codes, slice_index=2), prior.logits(codes, label=1)]
    given += [prior.logits(codes)]
    for one, other in itertools.combinations(given, 2):
        assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(prior.logits(codes, slice_index=[-1, -1], label=-1), prior.logits(codes))


def test_conditions_are_hidden_in_training_at_the_rate_asked_for():
    config = dataclasses.replace(SMALL, num_labels=0, condition_dropout=0.25)
    prior = randomised(config)
    vectors = prior.condition_vector(4000, {"slice_index": tf.ones(4000, tf.int32)}, training=True)[:, 0, 0]
    unknown = prior.condition_vector(1, {"slice_index": None})[0, 0, 0]
    share = np.all(np.isclose(vectors, unknown), axis=1).mean()
    assert share == pytest.approx(0.25, abs=0.03)


def test_of_two_conditions_both_are_hidden_for_half_of_the_share():
    prior = randomised(dataclasses.replace(SMALL, condition_dropout=0.4))
    ones = tf.ones(4000, tf.int32)
    vectors = prior.condition_vector(4000, {"slice_index": ones, "label": ones}, training=True)[:, 0, 0].numpy()
    for given, expected in (({}, 0.2), ({"slice_index": ones[:1]}, 0.1), ({"label": ones[:1]}, 0.1)):
        seen = prior.condition_vector(1, given)[0, 0, 0].numpy()
        assert np.all(np.isclose(vectors, seen), axis=1).mean() == pytest.approx(expected, abs=0.025)


def test_bad_conditions_and_codes_are_told():
    prior, codes = randomised(SMALL), some_codes(SMALL, 2)
    with pytest.raises(ValueError, match=r"slice_index is in \[0, 3\), or -1 for unknown. Received: \[3\]"):
        prior.logits(codes, slice_index=3)
    with pytest.raises(ValueError, match="label is no condition of this prior"):
        randomised(ARCHITECTURES["plain"]).logits(codes, label=1)
    with pytest.raises(ValueError, match=r"Codes are in \[0, 7\). Received: 0 to 7"):
        prior.logits(np.where(codes == codes.max(), 7, 0))


def test_prior_learns_more_than_the_histogram(models, index, vqvae, prior):
    history = ovq.read_history(models / "small-prior")
    report = ovq.evaluate_prior(prior, vqvae, index)
    assert history["val_bits_per_code"][-1] < history["val_bits_per_code"][0]
    assert history["val_bits_per_code"].min() == pytest.approx(report["validate_bits_per_code"], rel=1e-4)
    assert report["bits_per_code"] < report["baselines"]["unigram"] < report["baselines"]["uniform"] == 5.0
    assert report["bits_per_image"] == pytest.approx(64 * report["bits_per_code"])
    assert 0 < report["accuracy"] < 1
    gap = report["validate_bits_per_code"] - report["train_bits_per_code"]
    assert report["train_validate_gap"] == pytest.approx(gap)
    assert report["validate_bits_per_code"] < report["validate_baselines"]["unigram"]
    codes = ovq.encode_slices(vqvae, index.test)
    people = [ovq.code_scores(prior, codes[codes.subject == name])[0].mean() for name in np.unique(codes.subject)]
    assert len(people) == 2  # a quarter of the draws has one of them alone
    assert report["intervals"]["bits_per_code"] == pytest.approx(sorted(people), rel=1e-5)
    untold = -prior.log_prob(codes.codes) / np.log(2) / 64
    assert report["unconditional_bits_per_code"] == pytest.approx(untold.mean(), rel=1e-4)
    assert report["bits_per_code"] < untold.mean() < report["baselines"]["unigram"]  # to be told helps, and need not be


def test_saved_and_loaded_prior_is_the_same(tmp_path):
    prior, codes = randomised(SMALL), some_codes(SMALL, 3)
    prior.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.config == SMALL
    np.testing.assert_array_equal(loaded.logits(codes, slice_index=1), prior.logits(codes, slice_index=1))


@pytest.mark.gpu
def test_training_step_runs_on_the_gpu():
    prior, codes = ovq.PixelCNN(SMALL), some_codes(SMALL, 8)
    prior.compile("adam")
    assert np.all(np.isfinite(prior.train_on_batch({"codes": codes})))
    assert "GPU" in prior({"codes": codes}).device


def test_a_prior_that_always_knew_a_condition_is_told_it():
    """What stands for an unknown one has learned nothing."""
    prior = randomised(dataclasses.replace(SMALL, num_labels=0, condition_dropout=0.0))
    codes = some_codes(SMALL, 2)
    for left_out in (None, -1, [0, -1]):
        with pytest.raises(ValueError, match=r"slice_index is told to this prior.*\(condition_dropout=0\)"):
            prior.log_prob(codes, slice_index=left_out)
    assert np.isfinite(prior.log_prob(codes, slice_index=[0, 2])).all()
    assert ovq.sample_codes(prior, 2).shape == codes.shape  # which draws positions
