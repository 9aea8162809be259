"""Model folders: what is in them, what is refused, and that an interrupted training ends where it would have."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import imageio.v3 as iio
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PRIOR_CONFIG, VQVAE_CONFIG

import oasis_vq as ovq
from oasis_vq.__main__ import main
from oasis_vq.callbacks import SampleGrid
from oasis_vq.codes import encode_slices, encode_views
from oasis_vq.folders import load_model
from oasis_vq.preparation import SSIM_CLIP_NORM, build_optimizer, prepare_vqvae
from oasis_vq.sampling import sample_conditions


def test_model_folder_holds_what_it_should(models, vqvae, prior):
    for name in ("small", "small-prior"):
        files = {path.name for path in (models / name).iterdir()} - {"tensorboard"}
        epochs = {f"samples_epoch_{epoch:03d}.png" for epoch in (1, 2, 4, 8, 16)}
        shown = {"reconstructions.png"} if name == "small" else {"samples.png"} | epochs
        assert files == {"model.keras", "config.json", "metrics.json", "history.csv", "log.txt"} | shown
        assert not (models / f"{name}.partial").exists()
        metrics = json.loads((models / name / "metrics.json").read_text())
        assert all(isinstance(value, float) for value in metrics.values()) and metrics["num_parameters"] > 1000
        assert len(ovq.read_history(models / name)["epoch"]) == 20
    record = json.loads((models / "small-prior" / "config.json").read_text())
    assert record["vqvae"]["folder"] == "../small" and len(record["vqvae"]["sha256"]) == 64
    assert ovq.PriorConfig.from_dict(record["config"]) == PRIOR_CONFIG


def test_pictures_show_validation_slices_over_their_reconstructions(models, index, vqvae):
    grid = iio.imread(models / "small" / "reconstructions.png") / 255
    by_position = index.validate[np.argsort(index.validate.slice, kind="stable")]
    shown = by_position[np.linspace(0, len(by_position) - 1, 8).astype(int)]
    assert len(np.unique(shown.slice)) == min(8, len(np.unique(index.validate.slice)))
    images = ovq.load_images(shown, image_size=32)
    assert grid.shape == (2 * 32, 8 * 32)
    np.testing.assert_allclose(grid[:32], np.concatenate(list(images[..., 0]), axis=1), atol=0.003)
    again = vqvae.reconstruct(images)
    np.testing.assert_allclose(grid[32:], np.concatenate(list(again[..., 0]), axis=1), atol=0.003)


def test_pictures_of_a_prior_show_codes_over_samples(models, vqvae, prior):
    grid = iio.imread(models / "small-prior" / "samples.png")
    assert grid.shape == (2 * 32, 8 * 32, 3) and grid[:32].std() > 30
    positions = np.linspace(0, 7, 10)[1:-1].round().astype(int)
    codes = ovq.sample_codes(prior, 8, seed=0, slice_index=positions)
    brains = np.concatenate(list(vqvae.decode(codes)[..., 0]), axis=1)
    np.testing.assert_allclose(grid[32:, :, 0] / 255, brains, atol=0.003)
    cells = np.concatenate(list(codes), axis=1)
    assert len(np.unique(grid[:32:4, ::4].reshape(-1, 3), axis=0)) == len(np.unique(cells))


def test_wide_grids_are_drawn_too_but_fewer(tmp_path):
    vqvae = ovq.VQVAE(ovq.VQVAEConfig(image_size=66, downsampling=1, width=4, num_embeddings=4, num_residual_blocks=0))
    layers = {"architecture": "residual", "num_channels": 4, "num_residual_blocks": 0, "num_slices": 0}
    prior = ovq.PixelCNN(ovq.PriorConfig(grid_shape=(66, 66), num_embeddings=4, embedding_dim=2, **layers))
    SampleGrid(vqvae, tmp_path / "samples.png").draw(prior)
    assert iio.imread(tmp_path / "samples.png").shape == (2 * 66, 2 * 66, 3)


class Spoil(keras.callbacks.Callback):
    """From the third epoch on every weight is changed."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch >= 2:
            for weight in self.model.trainable_weights:
                weight.assign(weight + 1)


class Stop(keras.callbacks.Callback):
    """Ends after an epoch as Ctrl-C does."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("weight_average", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_best_weights_are_kept_and_patience_ends(tmp_path, index, vqvae, weight_average):
    config = dataclasses.replace(PRIOR_CONFIG, epochs=9, patience=2, weight_average=weight_average, clip_norm=1.0)
    prior = ovq.fit_or_load(tmp_path / "p", config, index, vqvae=vqvae, callbacks=[Spoil()])
    bits = ovq.read_history(tmp_path / "p")["val_bits_per_code"]
    assert len(bits) == 4 and bits.argmin() == 1
    assert json.loads((tmp_path / "p" / "metrics.json").read_text())["val_bits_per_code"] == bits[1]
    report = ovq.evaluate_prior(prior, vqvae, index)
    assert report["validate_bits_per_code"] == pytest.approx(bits[1], rel=1e-4)


@pytest.mark.slow
def test_best_averaged_weights_and_patience_survive_an_interruption(tmp_path, index, vqvae):
    """The best epoch is the second; the training is interrupted after the fourth, and patience ends with the fifth."""
    config = dataclasses.replace(PRIOR_CONFIG, epochs=9, patience=3, weight_average=0.8)
    with pytest.raises(KeyboardInterrupt):
        ovq.fit_or_load(tmp_path / "p", config, index, vqvae=vqvae, callbacks=[Spoil(), Stop(4)])
    prior = ovq.fit_or_load(tmp_path / "p", config, index, vqvae=vqvae, callbacks=[Spoil()])
    bits = ovq.read_history(tmp_path / "p")["val_bits_per_code"]
    assert len(bits) == 5 and bits.argmin() == 1
    report = ovq.evaluate_prior(prior, vqvae, index)
    assert report["validate_bits_per_code"] == pytest.approx(bits[1], rel=1e-4)


@pytest.mark.slow
def test_a_prior_that_goes_on_encodes_nothing_again(tmp_path, index, vqvae, monkeypatch, capsys):
    """Unless what it has kept is broken; either way it ends the same."""
    config = dataclasses.replace(PRIOR_CONFIG, epochs=2, num_views=2)
    with pytest.raises(KeyboardInterrupt):
        ovq.fit_or_load(tmp_path / "p", config, index, vqvae=vqvae, callbacks=[Stop(1)])
    (file,) = shutil.copytree(tmp_path / "p.partial", tmp_path / "q.partial").glob("codes-*.npz")
    assert ovq.Codes.load(file).codes.shape == (2 * 48 + 16, 8, 8)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :])
    ovq.fit_or_load(tmp_path / "q", config, index, vqvae=vqvae)
    assert ".npz cannot be read" in capsys.readouterr().out and not list((tmp_path / "q").glob("codes-*"))
    with monkeypatch.context() as patched:
        patched.delattr(ovq.VQVAE, "encode")
        ovq.fit_or_load(tmp_path / "p", config, index, vqvae=vqvae)
    assert "cannot be read" not in capsys.readouterr().out
    bits = [ovq.read_history(tmp_path / name)["val_bits_per_code"] for name in "pq"]
    np.testing.assert_allclose(*bits, rtol=1e-5)


@pytest.mark.slow
def test_average_of_weights_is_what_is_validated(tmp_path, index, vqvae):
    """After the first epoch the average is still near the first weights, the last weights are not."""
    config, bits = dataclasses.replace(PRIOR_CONFIG, epochs=10), {}
    for average in (0.0, 0.999):
        changed = dataclasses.replace(config, weight_average=average)
        ovq.fit_or_load(tmp_path / str(average), changed, index, vqvae=vqvae)
        bits[average] = ovq.read_history(tmp_path / str(average))["val_bits_per_code"]
    assert bits[0.0][0] < bits[0.999][0] - 0.02
    assert bits[0.999][-1] < bits[0.999][0] - 1  # over a tenth of a short training, not over a thousand steps


def test_tensorboard_logs_are_written_where_it_is_installed(tmp_path, index):
    pytest.importorskip("tensorboard")
    epochs = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(logs["val_codebook_usage"]))
    config = dataclasses.replace(VQVAE_CONFIG, epochs=2)
    ovq.fit_or_load(tmp_path / "watched", config, index, callbacks=[watch])
    assert list((tmp_path / "watched" / "tensorboard" / "validation").glob("events.*"))
    assert epochs == list(ovq.read_history(tmp_path / "watched")["val_codebook_usage"])


def test_learning_rate_rises_then_falls_to_zero(index, tmp_path):
    config = dataclasses.replace(VQVAE_CONFIG, learning_rate=2e-3, warmup_steps=10, batch_size=8, epochs=10)
    rates = [float(build_optimizer(config, 80)._learning_rate(step)) for step in (0, 5, 10, 55, 100)]  # 100 steps
    np.testing.assert_allclose(rates, [0, 1e-3, 2e-3, 1e-3, 0], atol=1e-8)
    short = dataclasses.replace(config, warmup_steps=90)
    assert float(build_optimizer(short, 80)._learning_rate(25)) == pytest.approx(2e-3)  # a quarter of all steps at most
    constant = dataclasses.replace(config, cosine_decay=False)
    assert float(build_optimizer(constant, 80).learning_rate) == pytest.approx(2e-3)
    here = {"cache": False, "strategy": tf.distribute.get_strategy()}
    assert prepare_vqvae(short, index, tmp_path, **here).model.ssim_warmup == 15  # of 60 steps


def test_gradient_is_limited_where_the_ssim_is_in_the_loss():
    """With it, a few steep steps in a row could leave the decoder black for good."""
    for ssim_weight, limit in ((0.0, None), (4.0, SSIM_CLIP_NORM)):
        config = dataclasses.replace(VQVAE_CONFIG, ssim_weight=ssim_weight)
        assert build_optimizer(config, 80).global_clipnorm == limit
    weight, steep = tf.Variable([0.0, 0.0]), tf.constant([3e6, 4e6])
    optimizer = build_optimizer(dataclasses.replace(config, warmup_steps=0), 80)
    optimizer.build([weight])
    optimizer.apply([steep])
    momentum = next(value for value in optimizer.variables if "momentum" in value.path)
    np.testing.assert_allclose(momentum, 0.1 * np.array([0.6, 0.8]) * SSIM_CLIP_NORM, rtol=1e-5)


@pytest.mark.parametrize("kind", ["VQ-VAE", "prior"])
def test_a_code_that_is_used_often_has_one_gradient(index, kind):
    """Adam takes the square of its sum, not the sum of the squares of its parts."""
    if kind == "VQ-VAE":
        model = ovq.VQVAE(dataclasses.replace(VQVAE_CONFIG, quantizer="gradient"))
        batch = tf.constant(ovq.load_images(index.train[:8], image_size=32))
    else:
        model = ovq.PixelCNN(dataclasses.replace(PRIOR_CONFIG, dropout=0.0, condition_dropout=0.0))
        batch = {"codes": tf.zeros((8, 8, 8), tf.int32), "slice_index": tf.zeros(8, tf.int32)}
    model.compile(keras.optimizers.Adam(1e-3))
    model.optimizer.build(model.trainable_variables)
    with tf.GradientTape() as tape:
        if kind == "VQ-VAE":
            loss = model.losses_of(batch, training=True)[0]["total_loss"]
        else:
            loss = tf.reduce_mean(model._logits_and_nats(batch, training=True)[1])
    gradients = tape.gradient(loss, model.trainable_variables)
    model.train_step((batch,))
    for gradient, squares in zip(gradients, model.optimizer._velocities, strict=True):
        expected = 1e-3 * tf.convert_to_tensor(gradient).numpy() ** 2
        np.testing.assert_allclose(squares, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_training_of_an_earlier_version_goes_on(tmp_path, index, vqvae, models):
    """Its history has fewer columns, its configuration fewer fields."""
    config = dataclasses.replace(VQVAE_CONFIG, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        ovq.fit_or_load(tmp_path / "old", config, index, callbacks=[Stop(1)])
    partial = tmp_path / "old.partial"
    record = json.loads((partial / "config.json").read_text())
    del record["config"]["precision"]
    (partial / "config.json").write_text(json.dumps(record))
    lines = (partial / "history.csv").read_text().splitlines()
    keep = [number for number, name in enumerate(lines[0].split(",")) if "codebook_usage" not in name]
    lines = [",".join(line.split(",")[number] for number in keep) for line in lines]
    (partial / "history.csv").write_text("\n".join(lines) + "\n")
    other = shutil.copytree(partial, tmp_path / "other.partial")
    ovq.fit_or_load(tmp_path / "old", config, index)
    usage = ovq.read_history(tmp_path / "old")["val_codebook_usage"]
    assert np.isnan(usage[0]) and 0 < usage[1] <= 1
    # A checkpoint that holds other things is told.
    shutil.rmtree(other / "checkpoints")
    epoch = tf.train.Checkpoint(epoch=tf.Variable(1, dtype=tf.int64))
    tf.train.CheckpointManager(epoch, str(other / "checkpoints"), max_to_keep=1).save(checkpoint_number=1)
    with pytest.raises(ValueError, match=r"other\.partial was begun by another version.*--restart"):
        ovq.fit_or_load(tmp_path / "other", config, index)


def test_second_call_loads(models, index, vqvae):
    before = (models / "small" / "model.keras").stat().st_mtime_ns
    again = ovq.fit_or_load(models / "small", VQVAE_CONFIG, index)
    assert (models / "small" / "model.keras").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.quantizer.codebook, vqvae.quantizer.codebook)


def test_other_configuration_is_refused_with_both_values(models, index, vqvae):
    other = dataclasses.replace(VQVAE_CONFIG, num_embeddings=16, seed=3)
    with pytest.raises(ValueError, match=r"num_embeddings: 32, not 16; seed: 0, not 3.*--restart"):
        ovq.fit_or_load(models / "small", other, index)


def test_prior_of_another_vqvae_is_refused(tmp_path, models, index, vqvae, prior):
    for name in ("small", "small-prior"):
        shutil.copytree(models / name, tmp_path / name)
    file = tmp_path / "small" / "model.keras"
    content = file.read_bytes()
    ovq.load_prior(tmp_path / "small-prior")
    file.write_bytes(content + b" ")
    with pytest.raises(ValueError, match=r"is not the VQ-VAE whose codes the prior .* expected SHA-256"):
        ovq.load_prior(tmp_path / "small-prior")
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(FileNotFoundError, match=r"No VQ-VAE in .*small, whose codes the prior"):
        ovq.load_prior(tmp_path / "small-prior")


def test_a_model_of_a_relative_folder_is_found_from_elsewhere(tmp_path, models, index, vqvae, monkeypatch):
    monkeypatch.chdir(models)
    loaded = ovq.load_vqvae("./small")
    monkeypatch.chdir(tmp_path)
    assert loaded.folder == models / "small"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file is a file. Expected the folder of a model"):
        ovq.fit_or_load("./file", VQVAE_CONFIG, index)


def test_prior_that_does_not_fit_is_refused(tmp_path, index, vqvae):
    with pytest.raises(ValueError, match=r"grid_shape: \[4, 4\], not \[8, 8\]"):
        ovq.fit_or_load(tmp_path / "p", dataclasses.replace(PRIOR_CONFIG, grid_shape=(4, 4)), index, vqvae=vqvae)
    with pytest.raises(ValueError, match=r"needs the VQ-VAE"):
        ovq.fit_or_load(tmp_path / "p", PRIOR_CONFIG, index)
    with pytest.raises(ValueError, match=r"needs a saved VQ-VAE"):
        ovq.fit_or_load(tmp_path / "p", PRIOR_CONFIG, index, vqvae=ovq.VQVAE(VQVAE_CONFIG))
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_models_are_told(tmp_path, models, vqvae, prior):
    with pytest.raises(FileNotFoundError, match=r"No config.json in .*nothing"):
        ovq.load_vqvae(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds a PixelCNN. Expected a VQVAE"):
        ovq.load_vqvae(models / "small-prior")
    broken = shutil.copytree(models / "small", tmp_path / "broken")
    (broken / "model.keras").write_bytes((broken / "model.keras").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"broken.model\.keras cannot be loaded"):
        ovq.load_vqvae(broken)
    (broken / "model.keras").unlink()
    with pytest.raises(FileNotFoundError, match=r"No model.keras in"):
        ovq.load_vqvae(broken)
    headless = json.dumps({"model": "PixelCNN", "config": PRIOR_CONFIG.to_dict()})
    for text in ("{}", "not JSON", '{"model": "VQVAE", "config": {"widht": 3}}', headless):
        (broken / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is not the configuration of a model"):
            ovq.load_vqvae(broken)


def test_prior_takes_positions_and_labels_from_the_data(index, adni):
    adni = ovq.find_slices(adni)
    config = PRIOR_CONFIG.conditioned_by(adni)
    assert (config.first_slice, config.num_slices, config.num_labels) == (78, 3, 2)
    assert config.conditioned_by(index) == PRIOR_CONFIG
    config = dataclasses.replace(PRIOR_CONFIG, condition_on=("label",)).conditioned_by(adni)
    assert (config.first_slice, config.num_slices, config.num_labels) == (0, 0, 2)
    config = dataclasses.replace(PRIOR_CONFIG, condition_on=("slice_index",)).conditioned_by(adni)
    assert (config.first_slice, config.num_slices, config.num_labels) == (78, 3, 0)
    config = dataclasses.replace(PRIOR_CONFIG, condition_on=()).conditioned_by(adni)
    assert (config.num_slices, config.num_labels) == (0, 0)


@pytest.mark.slow
def test_classes_and_positions_of_adni_reach_prior_and_samples(adni, tmp_path):
    """A prior on slices that are numbered from 78 on, of two classes whose brightness tells them apart."""
    for path in ovq.find_slices(adni).test.path:
        assert iio.imread(path).ndim == 2
    folder = shutil.copytree(adni, tmp_path / "adni")
    for path in folder.glob("*/AD/*.jpeg"):
        iio.imwrite(path, iio.imread(path) // 3)
    index = ovq.find_slices(folder)
    config = dataclasses.replace(VQVAE_CONFIG, epochs=30)
    vqvae = ovq.fit_or_load(tmp_path / "v", config, index)
    prior = ovq.fit_or_load(tmp_path / "p", dataclasses.replace(PRIOR_CONFIG, epochs=40), index, vqvae=vqvae)
    assert (prior.config.first_slice, prior.config.num_slices, prior.config.num_labels) == (78, 3, 2)
    dark, bright = (vqvae.decode(ovq.sample_codes(prior, 16, label=label)).mean() for label in (1, 0))
    assert dark < 0.8 * bright
    codes = vqvae.encode(ovq.load_images(index.test, image_size=32))
    right = prior.log_prob(codes, slice_index=index.test.slice, label=index.test.label).mean()
    wrong = prior.log_prob(codes, slice_index=index.test.slice, label=1 - index.test.label).mean()
    assert right > wrong + 5
    drawn = sample_conditions(prior, 64)
    assert set(drawn["slice_index"].tolist()) == {78, 79, 80} and set(drawn["label"].tolist()) == {0, 1}
    with pytest.raises(ValueError, match=r"slice_index is in \[78, 81\), or -1 for unknown. Received: \[3\]"):
        ovq.sample_codes(prior, 1, slice_index=3)
    ovq.sample_codes(prior, 1, slice_index=-1, label=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ovq.recipe_names())
def test_every_recipe_works_on_an_adni_folder(name, adni, tmp_path):
    """The layers, batches and losses as they are, on 64x64 slices for an epoch: from the folder to new brains."""
    shared, coarse, below, level = ["--data", adni, "--epochs", "1"], ovq.recipe(name).coarse, [], []
    if coarse:
        below = [
            ["train-vqvae", *shared, "--recipe", coarse, "--image-size", "64", "--out", tmp_path / "c"],
            ["train-prior", *shared, "--vqvae", tmp_path / "c", "--out", tmp_path / "c-prior"],
        ]
        level = ["--coarse", tmp_path / "c-prior"]
    for words in (
        *below,
        ["train-vqvae", *shared, "--recipe", name, "--image-size", "64", "--out", tmp_path / "v"],
        ["evaluate", tmp_path / "v", "--data", adni],
        ["train-prior", *shared, "--vqvae", tmp_path / "v", *level, "--out", tmp_path / "p"],
        ["generate", "--prior", tmp_path / "p", "-n", "2", "--out", tmp_path / "brains"],
    ):
        assert main([str(word) for word in words]) == 0
    vqvae, prior = ovq.recipe(name).vqvae, ovq.load_prior(tmp_path / "p").config
    side = 64 // vqvae.downsampling
    assert prior.grid_shape == (side, side) and prior.recipe == name and prior.refines == bool(coarse)
    assert prior.num_labels == (2 if "label" in ovq.recipe(name).prior.condition_on else 0)
    codes = ovq.Codes.load(tmp_path / "brains" / "codes.npz").codes
    assert codes.shape == (2, side, side) and codes.max() < vqvae.num_embeddings
    scores = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert np.isfinite(scores["brain_ssim"]) and scores["num_images"] == 24


def test_augmented_training_has_twice_the_steps_and_comes_back(tmp_path, index):
    config = dataclasses.replace(VQVAE_CONFIG, epochs=1, upside_down_copies=True, flip_left_right=True, max_shift=2)
    vqvae = ovq.fit_or_load(tmp_path / "v", config, index, cache=True)
    assert vqvae.config == config and list(Path(os.environ["OASIS_VQ_CACHE"]).glob("cohort-32-*.npy"))
    with pytest.raises(ValueError, match=r"max_shift: 2, not 1"):
        ovq.fit_or_load(tmp_path / "v", dataclasses.replace(config, max_shift=1), index)
    training = prepare_vqvae(config, index, tmp_path, cache=False, strategy=tf.distribute.get_strategy())
    assert training.num_items == 96 and len(list(training.stream(0, 8, None))) == 12


def test_a_model_of_stretched_slices_encodes_and_scores_stretched_ones(tmp_path, adni):
    index = ovq.find_slices(adni)
    vqvae = ovq.fit_or_load(tmp_path / "v", dataclasses.replace(VQVAE_CONFIG, epochs=1, fit="stretch"), index)
    images = ovq.load_images(index.test, image_size=32, fit="stretch")
    np.testing.assert_array_equal(ovq.encode_slices(vqvae, index.test).codes, vqvae.encode(images))
    report = ovq.evaluate_reconstruction(vqvae, index.test)
    assert report["ssim"] == pytest.approx(ovq.ssim(images, vqvae.reconstruct(images)), abs=1e-6)
    assert report["baselines"]["black"]["ssim"] == pytest.approx(ovq.ssim(images, images * 0), abs=1e-6)


def test_model_of_before_a_field_was_there_loads(tmp_path, models, prior):
    for name in ("small", "small-prior"):
        shutil.copytree(models / name, tmp_path / name)
        file = tmp_path / name / "config.json"
        record = json.loads(file.read_text())
        for field in ("fit", "max_shift", "first_slice", "condition_on"):
            record["config"].pop(field, None)
        file.write_text(json.dumps(record))
    assert ovq.load_prior(tmp_path / "small-prior").config == PRIOR_CONFIG


def test_other_data_are_refused(models, vqvae, copied):
    file = copied / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    index = ovq.find_slices(copied)
    ovq.fit_or_load(models / "small", VQVAE_CONFIG, index)  # the same slices in another place
    file.write_bytes((copied / "keras_png_slices_train" / "case_002_slice_3.nii.png").read_bytes())
    with pytest.raises(ValueError, match=r"was trained otherwise \(data train: \w+, not \w+\)"):
        ovq.fit_or_load(models / "small", VQVAE_CONFIG, ovq.find_slices(copied))


def test_restart_replaces_a_model_and_nothing_else(tmp_path, models, index, copied, vqvae, capsys):
    folder = shutil.copytree(models / "small", tmp_path / "model")
    before = (folder / "model.keras").read_bytes()
    other = dataclasses.replace(VQVAE_CONFIG, epochs=1)
    (copied / "keras_png_slices_train" / "case_002_slice_1.nii.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"case_002_slice_1"):
        ovq.fit_or_load(folder, other, ovq.find_slices(copied), restart=True)
    assert (folder / "model.keras").read_bytes() == before
    assert ovq.fit_or_load(folder, other, index, restart=True).config == other
    assert len(ovq.read_history(folder)["epoch"]) == 1
    with pytest.raises(KeyboardInterrupt, match="1 of 2 epochs are kept, and the same call goes on"):
        more = dataclasses.replace(VQVAE_CONFIG, epochs=2)
        ovq.fit_or_load(folder, more, index, restart=True, callbacks=[Stop(1)])
    assert ovq.fit_or_load(folder, other, index).config == other
    assert "what is to replace model was stopped: restart=True (--restart) goes on" in capsys.readouterr().out
    assert ovq.fit_or_load(folder, more, index, restart=True).config == more
    assert "model: going on after epoch 1 of 2" in capsys.readouterr().out and not (folder / "restarted").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"No config.json in .*thesis"):
        ovq.fit_or_load(tmp_path / "thesis", other, index, restart=True)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "mine"


def test_unreadable_slice_stops_before_anything_is_written(tmp_path, copied):
    (copied / "keras_png_slices_train" / "case_002_slice_1.nii.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"case_002_slice_1"):
        ovq.fit_or_load(tmp_path / "model", VQVAE_CONFIG, ovq.find_slices(copied))
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_codes_are_in_memory_once(index):
    """Those of the published ADNI slices at full resolution are 5 GB."""
    fine = ovq.VQVAEConfig(image_size=128, downsampling=1, width=4, num_embeddings=4, num_residual_blocks=0)
    vqvae = ovq.VQVAE(fine)
    slices = index.train[np.resize(np.arange(len(index.train)), 1024)]
    ovq.encode_slices(vqvae, slices[:64])  # what is made once
    tracemalloc.start()
    codes = encode_views(vqvae, slices, ovq.Augmentation(), 1).codes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes.dtype == np.uint8 and peak < 2 * codes.nbytes, (peak, codes.nbytes)  # and batches of 64 in int32


def test_views_are_codes_of_changed_slices_in_the_order_of_the_slices(index, vqvae):
    plain = ovq.encode_slices(vqvae, index.test).codes
    np.testing.assert_array_equal(
        encode_slices(vqvae, index.test, augmentation=ovq.Augmentation(), view=3).codes, plain
    )
    views = encode_views(vqvae, index.test, ovq.Augmentation(flip_left_right=True), 3)
    plain_and_mirrored = plain, vqvae.encode(ovq.load_images(index.test, image_size=32)[:, :, ::-1])
    first, *others = np.split(views.codes, 3)
    np.testing.assert_array_equal(first, plain)
    which = [[(one == other).all((1, 2)) for other in plain_and_mirrored] for one in others]
    assert all(np.logical_or(*both).all() for both in which) and (which[0][0] != which[1][0]).any()
    assert views.slice_index.tolist() == [*index.test.slice] * 3


def test_codes_come_back_from_disk(tmp_path, index, vqvae):
    codes = ovq.encode_slices(vqvae, index.test, split="test")
    codes.save(tmp_path / "codes.npz")
    again = ovq.Codes.load(tmp_path / "codes.npz")
    for name, values in vars(codes).items():
        np.testing.assert_array_equal(getattr(again, name), values)
    assert codes.codes.shape == (16, 8, 8) and codes.slice_index.tolist() == [*range(8)] * 2
    np.testing.assert_array_equal(codes.codes, vqvae.encode(ovq.load_images(index.test, image_size=32)))


KILLED = """
import sys, dataclasses, pathlib
sys.path.insert(0, {tests!r})
from conftest import PRIOR_CONFIG, VQVAE_CONFIG
import oasis_vq as ovq
index = ovq.find_slices({cohort!r})
vqvae = ovq.fit_or_load(pathlib.Path({folder!r}) / "v", dataclasses.replace(VQVAE_CONFIG, epochs=6), index)
config = dataclasses.replace(PRIOR_CONFIG, epochs=6, architecture="gated", weight_average=0.9, clip_norm=1.0)
config = dataclasses.replace(config, num_views=2, flip_left_right=True)
try:
    ovq.fit_or_load(pathlib.Path({folder!r}) / "v-prior", config, index, vqvae=vqvae)
except KeyboardInterrupt as stop:
    sys.exit(f"stopped: {{stop}}")
"""


@pytest.mark.slow
def test_killed_training_ends_where_the_uninterrupted_one_does(tmp_path, cohort):
    """The VQ-VAE is killed, the prior is told to end."""

    def start(name):
        code = KILLED.format(tests=str(Path(__file__).parent), cohort=str(cohort), folder=str(tmp_path / name))
        with (tmp_path / f"{name}.log").open("w") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)

    whole = start("whole")
    for awaited, how in (("v.partial", signal.SIGKILL), ("v-prior.partial", signal.SIGTERM)):
        process = start("killed")
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            history = tmp_path / "killed" / awaited / "history.csv"
            if history.exists() and len(history.read_text().splitlines()) >= 3:
                break
            time.sleep(0.005)
        process.send_signal(how)
        assert process.wait() != 0
        assert (tmp_path / "killed" / awaited).exists()
    assert "of 6 epochs are kept, and the same call goes on" in (tmp_path / "killed.log").read_text()
    assert start("killed").wait() == 0, (tmp_path / "killed.log").read_text()
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()
    assert "v-prior: going on after epoch" in (tmp_path / "killed.log").read_text()
    for name, kind in (("v", "VQVAE"), ("v-prior", "PixelCNN")):
        one, other = (ovq.read_history(tmp_path / run / name) for run in ("whole", "killed"))
        assert other["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
        for column in set(one) - {"seconds"}:
            np.testing.assert_array_equal(other[column], one[column])
        weights = [load_model(tmp_path / run / name, kind).get_weights() for run in ("whole", "killed")]
        for one, other in zip(*weights, strict=True):
            np.testing.assert_array_equal(other, one)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["v", "v-prior"]
