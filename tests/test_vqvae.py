"""The VQ-VAE: it learns, its verbs agree with each other, and it comes back from disk the same."""

import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import VQVAE_CONFIG

import oasis_vq as ovq
from oasis_vq.vqvae import pixel_loss, structural_similarity


@pytest.fixture(scope="module")
def images(index):
    return ovq.load_images(index.validate, image_size=32)


def test_training_learns_and_validation_is_scored(models, vqvae):
    history = ovq.read_history(models / "small")
    for name in ("total_loss", "reconstruction_loss", "vq_loss", "perplexity"):
        assert np.all(np.isfinite(history[name])) and np.all(history[f"val_{name}"] > 0)
    assert history["val_reconstruction_loss"][-1] < 0.7 * history["val_reconstruction_loss"][0]
    assert history["val_perplexity"][-1] > 4
    total = history["val_reconstruction_loss"] + history["val_vq_loss"]
    np.testing.assert_allclose(history["val_total_loss"], total, rtol=1e-4)


def test_reconstructions_beat_an_all_black_image(vqvae, images):
    again = vqvae.reconstruct(images)
    assert again.shape == images.shape and again.dtype == np.float32 and again.min() >= 0 and again.max() <= 1
    assert ovq.brain_ssim(images, again) > ovq.brain_ssim(images, np.zeros_like(images)) + 0.2


def test_verbs_agree(vqvae, images):
    codes = vqvae.encode(images)
    assert codes.shape == (len(images), 8, 8) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < VQVAE_CONFIG.num_embeddings
    np.testing.assert_array_equal(vqvae.decode(codes), vqvae.reconstruct(images))
    np.testing.assert_allclose(vqvae.decode(codes), np.clip(vqvae(images), 0, 1), atol=1e-5)
    np.testing.assert_array_equal(vqvae.encode(np.concatenate([images] * 5))[: len(images)], codes)  # several batches


@pytest.mark.parametrize(
    ("quantizer", "precision"),
    [
        ("gradient", "float32"),
        ("ema", "float32"),
        ("ema", "mixed_bfloat16"),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in (("ema", "mixed_float16"), ("gradient", "mixed_bfloat16"), ("gradient", "mixed_float16"))
        ),
    ],
)
def test_loss_falls_and_the_loaded_model_is_the_same(tmp_path, images, quantizer, precision):
    model = ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, quantizer=quantizer, precision=precision))
    assert keras.config.dtype_policy().name == "float32"  # what was built so leaves the session as it was
    computed = {layer.compute_dtype for layer in (*model.encoder.layers[1:], *model.decoder.layers[1:-1])}
    assert computed == {precision.removeprefix("mixed_")} and model.quantizer.compute_dtype == "float32"
    model.image_variance.assign(0.125)
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    data = tf.data.Dataset.from_tensor_slices(images).batch(8)
    losses = model.fit(data, epochs=16, verbose=0, shuffle=False).history["reconstruction_loss"]
    assert losses[-1] < 0.8 * losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.config == model.config and float(loaded.image_variance) == 0.125
    for own, other in zip(model.weights, loaded.weights, strict=True):
        assert own.dtype == "float32" or own.path.endswith("num_steps")
        np.testing.assert_array_equal(own, other)
    np.testing.assert_array_equal(loaded.reconstruct(images), model.reconstruct(images))


ARCHITECTURES = {
    "full resolution, sigmoid, cross-entropy": {
        "downsampling": 1, "channels": (8, 8), "num_residual_blocks": 0, "kernel_size": 3, "loss": "bce",
        "output_activation": "sigmoid", "ssim_weight": 0.0,
    },
    "batch normalization, sigmoid latents, tanh": {
        "channels": (8, 16), "num_residual_blocks": 0, "batch_norm": True, "activation": "leaky_relu",
        "latent_kernel_size": 3, "latent_activation": "sigmoid", "output_activation": "tanh",
    },
    "half resolution, residual, absolute error": {"downsampling": 2, "loss": "l1", "activation": "silu"},
    "8 times, residual, batch normalization": {"downsampling": 8, "batch_norm": True, "activation": "gelu"},
    "a convolution more than strides": {"channels": (16, 8, 8), "num_residual_blocks": 0, "kernel_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_and_comes_back(tmp_path, images, name):
    keras.utils.set_random_seed(0)  # which the tests before it have moved, in another order each time
    config = dataclasses.replace(VQVAE_CONFIG, **ARCHITECTURES[name])
    model = ovq.VQVAE(config)
    model.image_variance.assign(images.var())
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    data = tf.data.Dataset.from_tensor_slices(images).batch(8)
    losses = model.fit(data, epochs=16, verbose=0, shuffle=False).history["reconstruction_loss"]
    assert losses[-1] < 0.9 * losses[0]
    side = 32 // config.downsampling
    assert model.encode(images).shape == (len(images), side, side)
    before_clipping = model(images).numpy()
    assert before_clipping.shape == images.shape
    if config.output_activation != "linear":
        assert before_clipping.min() >= 0 and before_clipping.max() <= 1
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "model.keras").reconstruct(images), model.reconstruct(images)
    )


PUBLISHED_LAYERS = {
    "keras_io": [
        ("Conv2D", 32, 3, 2), ("Conv2D", 64, 3, 2), ("Conv2D", 16, 1, 1),
        ("Conv2DTranspose", 64, 3, 2), ("Conv2DTranspose", 32, 3, 2), ("Conv2D", 1, 3, 1),
    ],
    "bce_search": [
        ("Conv2D", 32, 3, 1), ("Conv2D", 10, 3, 1), ("Conv2DTranspose", 32, 3, 1), ("Conv2D", 1, 3, 1),
    ],
    "batchnorm_tanh": [
        ("Conv2D", 16, 4, 2), "BatchNormalization", ("Conv2D", 32, 4, 2), "BatchNormalization", ("Conv2D", 16, 3, 1),
        ("Conv2DTranspose", 32, 3, 1), "BatchNormalization", ("Conv2DTranspose", 16, 4, 2), "BatchNormalization",
        ("Conv2DTranspose", 1, 4, 2), "Rescaling",
    ],
    "deep_residual": [
        ("Conv2D", 256, 3, 2), ("Conv2D", 128, 3, 2), ("Conv2D", 64, 3, 1), ("Conv2D", 128, 3, 1),
        ("Conv2DTranspose", 64, 3, 1), ("Conv2DTranspose", 128, 3, 2), ("Conv2DTranspose", 256, 3, 2),
        ("Conv2D", 1, 3, 1),
    ],
}  # fmt: skip
PUBLISHED_LAYERS |= {name: PUBLISHED_LAYERS["keras_io"] for name in ("adni_compact", "streaming_small")}


@pytest.mark.parametrize("name", PUBLISHED_LAYERS)
def test_published_systems_have_their_layers(name):
    """Filters, kernel and stride of each convolution, as far as their reports state them."""
    model = ovq.VQVAE(dataclasses.replace(ovq.recipe(name).vqvae, image_size=32))
    layers = []
    for layer in (*model.encoder.layers, *model.decoder.layers):
        kind = type(layer).__name__
        if kind.startswith("Conv"):
            layers.append((kind, layer.filters, layer.kernel_size[0], layer.strides[0]))
        elif kind not in ("InputLayer", "Activation"):
            layers.append(kind)
    assert layers == PUBLISHED_LAYERS[name]
    if name == "deep_residual":  # its report says about 955,000
        assert sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) == 955_905


def test_published_priors_have_their_layers():
    shapes = {}
    for name in ("bce_search", "batchnorm_tanh", "deep_residual"):
        prior = ovq.PixelCNN(dataclasses.replace(ovq.recipe(name).prior, grid_shape=(8, 8)))
        first = (prior.first.mask_type, prior.first.kernel_size, prior.first.filters)
        blocks = [(block.before.units, block.masked.kernel_size, block.masked.filters, block.after.units)
                  for block in prior.blocks]  # fmt: skip
        shapes[name] = first, blocks, [layer.units for layer in prior.head], prior.to_logits.units
    assert shapes == {
        "bce_search": (("A", 7, 128), [], [], 10),
        "batchnorm_tanh": (("A", 9, 256), [(256, 3, 128, 256)] * 2, [256] * 2, 64),
        "deep_residual": (("A", 7, 128), [(128, 3, 64, 128)] * 16, [128] * 16, 512),
    }


def test_pixel_losses_equal_numpy(images):
    generator = np.random.default_rng(0)
    again = generator.uniform(0.01, 0.99, images.shape).astype(np.float32)
    own, other = images.astype(np.float64), again.astype(np.float64)
    expected = {
        "mse": ((own - other) ** 2).mean() / 0.04,
        "l1": np.abs(own - other).mean() / 0.2,
        "bce": -(own * np.log(other) + (1 - own) * np.log(1 - other)).mean(),
    }
    for name, value in expected.items():
        assert float(pixel_loss(name, images, again, variance=0.04)) == pytest.approx(value, rel=1e-5), name
    near = np.clip(images, 0.01, 0.99)
    for name in expected:
        assert pixel_loss(name, images, near) < pixel_loss(name, images, again)
    with pytest.raises(ValueError, match=r"'bce' needs output_activation 'sigmoid'. Received: linear"):
        ovq.VQVAEConfig(loss="bce")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_ssim_term_is_that_of_tensorflow(images, monkeypatch, on_gpu):
    """Also as GPUs compute it."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: ["a GPU"] * on_gpu)
    plain, weighted = (ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, ssim_weight=weight)) for weight in (0.0, 2.0))
    weighted.set_weights(plain.get_weights())
    term = 2 * (1 - tf.reduce_mean(tf.image.ssim(images, plain(images), 1.0)))
    losses = [model.losses_of(images, training=False)[0]["reconstruction_loss"] for model in (plain, weighted)]
    assert float(losses[1] - losses[0]) == pytest.approx(float(term), rel=1e-4)
    again = tf.constant(plain.reconstruct(images))
    gradients = []
    for similarity in (structural_similarity, lambda one, other: tf.reduce_mean(tf.image.ssim(one, other, 1.0))):
        with tf.GradientTape() as tape:
            tape.watch(again)
            value = similarity(images, again)
        gradients.append(tape.gradient(value, again).numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=0, atol=1e-3 * np.abs(gradients[1]).max())


def test_ssim_comes_in_over_the_warm_up(images):
    config = dataclasses.replace(VQVAE_CONFIG, quantizer="gradient")  # whose codebook does not learn as it is used
    model, plain = (ovq.VQVAE(dataclasses.replace(config, ssim_weight=weight)) for weight in (2.0, 0.0))
    plain.set_weights(model.get_weights())

    def term(*, training):
        losses = [each.losses_of(images, training=training)[0]["reconstruction_loss"] for each in (model, plain)]
        return float(losses[0] - losses[1])

    whole = term(training=False)
    model.compile(optimizer="adam")
    model.ssim_warmup = 8
    for step, share in ((0, 0), (2, 0.25), (8, 1), (20, 1)):
        model.optimizer.iterations.assign(step)
        assert term(training=False) == pytest.approx(whole, rel=1e-4)
        assert term(training=True) == pytest.approx(share * whole, rel=1e-4, abs=1e-6)


def test_adapt_takes_the_variance_of_the_pixels(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.adapt(tf.data.Dataset.from_tensor_slices(images).batch(5))
    assert float(model.image_variance) == pytest.approx(images.var(), rel=1e-5)
    with pytest.raises(ValueError, match="Images need to differ"):
        model.adapt(tf.data.Dataset.from_tensors(np.zeros_like(images)))


def test_every_weight_is_trained(images):
    for quantizer in ("gradient", "ema"):
        model = ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, quantizer=quantizer))
        model.compile(optimizer="adam", run_eagerly=True)  # one step: tracing it would take longer
        before = [weight.numpy() for weight in model.trainable_weights]
        model.train_on_batch(images)
        for weight, old in zip(model.trainable_weights, before, strict=True):
            assert not np.array_equal(weight, old), weight.path


def test_ema_codebook_moves_in_training_only(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.compile(optimizer="adam", run_eagerly=True)
    model.train_on_batch(images)
    before = model.quantizer.codebook.numpy()
    model.evaluate(images, verbose=0)
    np.testing.assert_array_equal(model.quantizer.codebook, before)
    model.train_on_batch(images)
    assert not np.array_equal(model.quantizer.codebook, before)


def test_training_step_compiles_with_xla(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.compile(optimizer="adam", jit_compile=True)
    losses = [model.train_on_batch(images, return_dict=True)["total_loss"] for _ in range(3)]
    assert np.all(np.isfinite(losses))


@pytest.mark.parametrize("name", ovq.recipe_names())
def test_every_recipe_builds_two_models_that_fit(name):
    recipe = ovq.recipe(name)
    vqvae, prior = ovq.VQVAE(recipe.vqvae), ovq.PixelCNN(recipe.prior)
    size = recipe.vqvae.image_size
    codes = vqvae.encode(np.random.default_rng(0).uniform(size=(1, size, size, 1)))
    given = {"draft": codes} if recipe.prior.refines else {}
    assert prior.logits(codes, **given).shape == (*codes.shape, recipe.vqvae.num_embeddings)
    assert vqvae.decode(codes).shape == (1, size, size, 1)


def test_no_images_give_no_codes(vqvae, images):
    codes = vqvae.encode(images[:0])
    assert codes.shape == (0, 8, 8) and codes.dtype == np.int32
    assert vqvae.decode(codes).shape == (0, 32, 32, 1)


def test_two_devices_train_as_one():
    """Gradient descent on two devices with half a batch each: weights and metrics are those of one device."""
    subprocess.run([sys.executable, "-c", TWO_DEVICES], check=True)


TWO_DEVICES = """
import numpy as np
from oasis_vq.runtime import start_tensorflow

start_tensorflow()
import keras
import tensorflow as tf

import oasis_vq as ovq

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
images = np.random.default_rng(0).uniform(size=(16, 16, 16, 1)).astype(np.float32)
config = ovq.VQVAEConfig(
    image_size=16, downsampling=4, width=8, num_residual_blocks=1, num_embeddings=16, embedding_dim=4,
    quantizer="gradient",
)

def trained(strategy):
    with strategy.scope():
        model = ovq.VQVAE(config)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
    data = tf.data.Dataset.from_tensor_slices(images).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    logs = model.fit(data.with_options(options), epochs=2, shuffle=False, verbose=0).history
    return [weight.numpy() for weight in model.trainable_weights], logs

keras.utils.set_random_seed(0)
alone, logs = trained(tf.distribute.get_strategy())
keras.utils.set_random_seed(0)
shared, shared_logs = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
for own, other in zip(alone, shared):
    np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-5)
for name in logs:
    np.testing.assert_allclose(logs[name], shared_logs[name], rtol=1e-3, err_msg=name)
"""


def test_sizes_that_do_not_fit_are_told(vqvae, images):
    with pytest.raises(ValueError, match=r"multiple of downsampling \(8\), for example 96. Received: 100"):
        ovq.VQVAEConfig(image_size=100, downsampling=8)
    with pytest.raises(ValueError, match=r"Images are \(n, 32, 32, 1\).*\(16, 30, 30, 1\)"):
        vqvae.encode(images[:, 1:-1, 1:-1])
    with pytest.raises(ValueError, match=r"Codes are in \[0, 32\). Received: 0 to 32"):
        vqvae.decode(np.array([[[0] * 8] * 7 + [[32] * 8]]))
    with pytest.raises(ValueError, match=r"Codes are \(n, 8, 8\) integers"):
        vqvae.decode(np.zeros((1, 8, 8)))


@pytest.mark.gpu
def test_training_step_runs_on_the_gpu(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.compile(optimizer="adam")
    losses = [model.train_on_batch(images, return_dict=True)["total_loss"] for _ in range(3)]
    assert np.all(np.isfinite(losses))
    assert "GPU" in model.encoder(images).device and "GPU" in model.quantizer.codebook.value.device
