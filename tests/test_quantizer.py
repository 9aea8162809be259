"""The quantizers against NumPy: search, gradients, moving averages, restarts."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from oasis_vq import EMAVectorQuantizer, VectorQuantizer
from oasis_vq.quantizer import CodebookUsage, Perplexity, nearest_codes, perplexity

K, D, BETA = 12, 5, 0.25
QUANTIZERS = {
    "gradient": lambda **options: VectorQuantizer(K, D, commitment_cost=BETA, **options),
    "ema": lambda **options: EMAVectorQuantizer(K, D, commitment_cost=BETA, restart_interval=0, **options),
}


def with_codebook(name, generator, **options):
    quantizer = QUANTIZERS[name](**options)
    quantizer.build((None, 4, 6, D))
    quantizer.codebook.assign(generator.normal(size=(K, D)))
    return quantizer


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture
def latents(generator):
    return generator.normal(size=(3, 4, 6, D)).astype(np.float32)


def distances(latents, codebook):
    return ((latents[..., None, :] - codebook) ** 2).sum(-1)


def test_nearest_code_equals_numpy_and_ties_go_to_the_lower_index(latents, generator):
    codebook = generator.normal(size=(K, D)).astype(np.float32)
    codes = nearest_codes(tf.constant(latents), tf.constant(codebook)).numpy()
    assert codes.dtype == np.int32 and codes.shape == latents.shape[:-1]
    np.testing.assert_array_equal(codes, distances(latents, codebook).argmin(-1))
    # Whole numbers: every product is exact, and rounding breaks no tie.
    whole, vectors = np.round(latents), generator.integers(-2, 3, size=(K, D)).astype(np.float32)
    twice = np.concatenate([vectors, vectors])
    expected = distances(whole, vectors).argmin(-1)
    np.testing.assert_array_equal(nearest_codes(tf.constant(whole), tf.constant(twice)), expected)


@pytest.mark.parametrize("size", [1, 8 * K, 10 * K, 72 * K, 100 * K])
def test_search_in_tiles_gives_the_same_codes(latents, generator, monkeypatch, size):
    """72 latents in tiles of 1, 8, 10 (the last one padded), 72 and 100, also when their number is not known."""
    codebook = generator.normal(size=(K, D)).astype(np.float32)
    monkeypatch.setattr("oasis_vq.quantizer.TILE_SIZE", size)
    expected = distances(latents, codebook).argmin(-1)
    np.testing.assert_array_equal(nearest_codes(tf.constant(latents), tf.constant(codebook)), expected)
    for options in ({}, {"jit_compile": True}):
        search = tf.function(
            nearest_codes, input_signature=[tf.TensorSpec((None, 4, 6, D)), tf.TensorSpec((K, D))], **options
        )
        np.testing.assert_array_equal(search(latents, codebook), expected)


def test_search_computes_no_more_similarities_than_there_are_latents(latents, generator, monkeypatch):
    """But for what makes the tiles equal: 72 latents are 4 tiles of 18 where at most 20 fit, also if 1000 would."""
    product, rows = tf.matmul, []

    def watched(part, *args, **kwargs):
        seen = tf.numpy_function(lambda values: rows.append(len(values)) or values, [part], part.dtype)
        return product(tf.ensure_shape(seen, part.shape), *args, **kwargs)

    monkeypatch.setattr(tf, "matmul", watched)
    for size, expected in ((20 * K, [18] * 4), (1000 * K, [72])):
        monkeypatch.setattr("oasis_vq.quantizer.TILE_SIZE", size)
        rows.clear()
        search = tf.function(nearest_codes, input_signature=[tf.TensorSpec((None, 4, 6, D)), tf.TensorSpec((K, D))])
        search(latents, generator.normal(size=(K, D)).astype(np.float32))
        assert rows == expected


@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract_of_every_quantizer(name, latents, generator):
    quantizer = with_codebook(name, generator)
    quantized, codes, loss = quantizer(latents)
    codebook = quantizer.codebook.numpy()
    np.testing.assert_array_equal(quantized, codebook[codes.numpy()])
    np.testing.assert_array_equal(codes, quantizer.codes(tf.constant(latents)))
    np.testing.assert_allclose(quantizer.lookup(codes), codebook[codes.numpy()])
    assert loss.shape == () and quantized.dtype == tf.float32 and codes.dtype == tf.int32
    again = type(quantizer).from_config(quantizer.get_config())
    assert again.get_config() == quantizer.get_config()
    with pytest.raises(ValueError, match=f"embedding_dim={D} channels. Received"):
        quantizer(latents[..., :-1])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradient_passes_unchanged_and_commitment_pulls_the_latents(name, latents, generator):
    """d/dz of <w, quantized> + loss is w + beta * 2 (z - e) / size: van den Oord et al. 2017, equation 3."""
    quantizer = with_codebook(name, generator)
    weights = generator.normal(size=latents.shape).astype(np.float32)
    inputs = tf.Variable(latents)
    with tf.GradientTape(persistent=True) as tape:
        quantized, codes, loss = quantizer(inputs)
        passed = tf.reduce_sum(weights * quantized)
    np.testing.assert_allclose(tape.gradient(passed, inputs), weights, atol=1e-6)
    nearest = quantizer.codebook.numpy()[codes.numpy()]
    np.testing.assert_allclose(
        tape.gradient(loss, inputs), BETA * 2 * (latents - nearest) / latents.size, rtol=1e-5, atol=1e-7
    )


def test_codebook_gradient_pulls_each_vector_to_its_latents(latents, generator):
    quantizer = with_codebook("gradient", generator)
    assert [weight.name for weight in quantizer.trainable_weights] == ["codebook"]
    with tf.GradientTape() as tape:
        _, codes, loss = quantizer(latents)
    gradient = tf.convert_to_tensor(tape.gradient(loss, quantizer.trainable_variables)[0])
    expected = np.zeros((K, D))
    codebook = quantizer.codebook.numpy()
    for latent, code in zip(latents.reshape(-1, D), codes.numpy().ravel(), strict=True):
        expected[code] += 2 * (codebook[code] - latent) / latents.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    nearest = codebook[codes.numpy()]
    assert float(loss) == pytest.approx((1 + BETA) * ((latents - nearest) ** 2).mean(), rel=1e-5)


def test_ema_update_equals_numpy(latents, generator):
    """van den Oord et al. 2017, appendix A.1, equations 6 to 8."""
    quantizer = with_codebook("ema", generator)
    quantizer.num_steps.assign(1)  # past the initialisation
    quantizer.average_sums.assign(quantizer.codebook)
    codebook = quantizer.codebook.numpy()
    counts, sums = np.ones(K), codebook.astype(np.float64)
    flat = latents.reshape(-1, D)
    for _ in range(3):
        codes = distances(flat, codebook).argmin(-1)
        onehot = np.eye(K)[codes]
        counts = 0.99 * counts + 0.01 * onehot.sum(0)
        sums = 0.99 * sums + 0.01 * onehot.T @ flat
        codebook = sums / counts[:, None]
        quantizer(latents, training=True)
        np.testing.assert_allclose(quantizer.codebook, codebook, rtol=1e-5, atol=1e-6)
    assert quantizer.trainable_weights == []
    before = quantizer.codebook.numpy()
    quantizer(latents, training=False)
    np.testing.assert_array_equal(quantizer.codebook, before)


def test_first_training_step_puts_the_codebook_on_the_latents(latents):
    quantizer = EMAVectorQuantizer(K, D)
    _, codes, _ = quantizer(latents + 7, training=True)
    assert len(np.unique(codes)) > K // 2
    # after one update of an average that started on a latent, every vector is still among the latents
    assert distances(quantizer.codebook.numpy(), (latents + 7).reshape(-1, D)).min(-1).max() < 1.0


def test_dead_codes_restart_on_schedule_and_the_living_stay(latents):
    quantizer = EMAVectorQuantizer(K, D, restart_interval=5)
    for _ in range(3):
        quantizer(latents, training=True)
    far = quantizer.codebook.numpy()
    far[3] = 1e3
    quantizer.codebook.assign(far)
    quantizer.average_sums.assign(far * quantizer.average_counts.numpy()[:, None])
    counts = quantizer.average_counts.numpy()
    counts[3] = 1e-4
    quantizer.average_counts.assign(counts)
    for _ in range(2):  # steps 3 and 4: not yet
        quantizer(latents, training=True)
    assert np.abs(quantizer.codebook.numpy()[3]).max() > 100
    alive = np.delete(quantizer.codebook.numpy(), 3, axis=0)
    quantizer(latents, training=True)  # step 5
    assert np.abs(quantizer.codebook.numpy()[3]).max() < 10
    np.testing.assert_allclose(np.delete(quantizer.codebook.numpy(), 3, axis=0), alive, atol=0.2)


def test_quantizers_stay_in_float32_under_a_precision_policy(latents, generator):
    for name in QUANTIZERS:
        quantizer = with_codebook(name, generator, dtype="mixed_bfloat16")
        quantized, _, loss = quantizer(tf.cast(latents, tf.bfloat16))
        assert quantizer.codebook.dtype == "float32" and quantized.dtype == loss.dtype == tf.float32


@pytest.mark.parametrize("name", QUANTIZERS)
def test_xla_computes_the_same(name, latents):
    results = []
    for compiled in (True, False):
        quantizer = with_codebook(name, np.random.default_rng(1))
        if name == "ema":
            quantizer.num_steps.assign(1)  # past the draw of the first step, which is another one under XLA
            quantizer.average_sums.assign(quantizer.codebook)
        step = tf.function(lambda x: quantizer(x, training=True), jit_compile=compiled)  # noqa: B023
        quantized, codes, loss = [step(tf.constant(latents)) for _ in range(3)][-1]
        results.append([quantized, codes, loss, *(weight.numpy() for weight in quantizer.weights)])
    for compiled, plain in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_batch_with_infinities_leaves_no_trace(latents, compiled, step):
    """Also at the first step and at a restart, which would draw from it."""
    quantizer = EMAVectorQuantizer(K, D, restart_interval=4)
    train = tf.function(lambda x: quantizer(x, training=True), jit_compile=compiled)
    broken = latents.copy()
    broken[0, 0] = np.inf
    for number in range(12):
        loss = train(tf.constant(broken if number == step else latents))[2]
    assert np.isfinite(loss) and all(np.isfinite(weight.numpy()).all() for weight in quantizer.weights)
    assert len(np.unique(quantizer.codes(latents))) > K // 2


def test_replicas_share_one_codebook():
    """Two devices with half a batch each: updates give what one device gives, and restarts leave both the same."""
    subprocess.run([sys.executable, "-c", TWO_REPLICAS], check=True)


TWO_REPLICAS = """
import numpy as np
from oasis_vq.runtime import start_tensorflow

start_tensorflow()
import tensorflow as tf

from oasis_vq import EMAVectorQuantizer

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
latents = np.random.default_rng(0).normal(size=(6, 8, 4, 4, 3)).astype(np.float32)

def prepared():
    quantizer = EMAVectorQuantizer(16, 3, restart_interval=4)
    quantizer.build((None, 4, 4, 3))
    return quantizer

def state(quantizer):
    return [weight.numpy() for weight in quantizer.weights]

alone = prepared()
with strategy.scope():
    shared = prepared()

@tf.function
def train(halves):
    strategy.run(lambda half: shared(half, training=True), args=(halves,))

for step, batch in enumerate(latents):
    train(strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(batch[4 * context.replica_id_in_sync_group :][:4])
    ))
    alone(batch, training=True)
    for weight in shared.weights:
        copies = strategy.experimental_local_results(weight.value)
        assert len(copies) == 2, weight.path
        np.testing.assert_array_equal(copies[0], copies[1])
    for own, other in zip(state(alone), state(shared)):  # also what is drawn at steps 0 and 4
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
assert np.isfinite(state(shared)[0]).all() and state(shared)[-1] == 6
"""


def test_perplexity_is_over_everything_seen(generator):
    metric = Perplexity(K)
    parts = [np.full((2, 3), 1, np.int32), np.full((2, 3), 2, np.int32)]
    for part in parts:
        metric.update_state(part)
    assert float(metric.result()) == pytest.approx(2.0)
    usage = CodebookUsage(K)
    usage.update_state(np.stack(parts))
    assert float(usage.result()) == pytest.approx(2 / K)
    assert perplexity(np.stack(parts), K) == pytest.approx(2.0)
    metric.reset_state()
    codes = generator.integers(0, K, 10_000)
    metric.update_state(codes)
    assert float(metric.result()) == pytest.approx(perplexity(codes, K), rel=1e-5)
    assert perplexity(np.zeros(5, int), K) == 1.0
    assert isinstance(metric, keras.metrics.Metric)


def test_without_restarts_a_vector_that_nothing_chooses_stays_where_it_is(latents):
    quantizer = EMAVectorQuantizer(K, D, decay=0.9, restart_interval=0)
    train = tf.function(lambda x: quantizer(x, training=True))
    train(tf.constant(latents))  # where all move onto latents
    far = quantizer.codebook.numpy()
    far[3] = 1e3
    quantizer.codebook.assign(far)
    quantizer.average_sums.assign(far * quantizer.average_counts.numpy()[:, None])
    for _ in range(200):  # its count falls below what a division bears after 110
        train(tf.constant(latents))
    np.testing.assert_allclose(quantizer.codebook.numpy()[3], 1e3, rtol=1e-2)
