"""The VQ-VAE: it learns, its verbs agree with each other, and it comes back from disk the same."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import VQVAE_CONFIG

import oasis_vq as ovq


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


@pytest.mark.parametrize("quantizer", ["gradient", "ema"])
def test_saved_and_loaded_model_is_the_same(tmp_path, images, quantizer):
    model = ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, quantizer=quantizer))
    model.image_variance.assign(0.125)
    model.compile(optimizer="adam")
    model.fit(tf.data.Dataset.from_tensor_slices(images).batch(8), epochs=1, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.config == model.config and float(loaded.image_variance) == 0.125
    for own, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(own, other)
    np.testing.assert_array_equal(loaded.reconstruct(images), model.reconstruct(images))


def test_adapt_takes_the_variance_of_the_pixels(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.adapt(tf.data.Dataset.from_tensor_slices(images).batch(5))
    assert float(model.image_variance) == pytest.approx(images.var(), rel=1e-5)
    with pytest.raises(ValueError, match="Images need to differ"):
        model.adapt(tf.data.Dataset.from_tensors(np.zeros_like(images)))


def test_every_weight_is_trained(images):
    for quantizer in ("gradient", "ema"):
        model = ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, quantizer=quantizer))
        model.compile(optimizer="adam")
        before = [weight.numpy() for weight in model.trainable_weights]
        model.train_on_batch(images)
        for weight, old in zip(model.trainable_weights, before, strict=True):
            assert not np.array_equal(weight, old), weight.path


def test_ema_codebook_moves_in_training_only(images):
    model = ovq.VQVAE(VQVAE_CONFIG)
    model.compile(optimizer="adam")
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


def test_recipes_follow_the_keras_io_layers():
    model = ovq.VQVAE(dataclasses.replace(ovq.recipe("keras_io").vqvae, image_size=32))
    layers = [layer for part in (model.encoder, model.decoder) for layer in part.layers if "conv" in layer.name]
    assert [(layer.filters, layer.kernel_size[0], layer.strides[0]) for layer in layers[:2]] == [(32, 3, 2), (64, 3, 2)]
    assert [(layer.filters, layer.kernel_size[0], layer.strides[0]) for layer in layers[-2:]] == [
        (64, 3, 2),
        (32, 3, 2),
    ]


@pytest.mark.parametrize("name", ovq.recipe_names())
def test_every_recipe_builds_two_models_that_fit(name):
    recipe = ovq.recipe(name)
    vqvae, prior = ovq.VQVAE(recipe.vqvae), ovq.PixelCNN(recipe.prior)
    size = recipe.vqvae.image_size
    codes = vqvae.encode(np.random.default_rng(0).uniform(size=(1, size, size, 1)))
    assert prior.logits(codes).shape == (*codes.shape, recipe.vqvae.num_embeddings)
    assert vqvae.decode(codes).shape == (1, size, size, 1)


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
