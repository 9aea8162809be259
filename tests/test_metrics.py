"""Scores: against their definitions, and beside baselines that must not pass for good."""

import dataclasses
import json

import numpy as np
import pytest
from skimage.metrics import structural_similarity

import oasis_vq as ovq
from oasis_vq.evaluation import code_baselines, evaluate_prior, mean_slices, table
from oasis_vq.files import write_json


@pytest.fixture(scope="module")
def images(index):
    return ovq.load_images(index.test, image_size=64)


def test_perfect_and_black_reconstructions(images):
    assert ovq.ssim(images, images) == pytest.approx(1) and ovq.brain_ssim(images, images) == pytest.approx(1)
    assert ovq.psnr(images, images) == float("inf")
    black = np.zeros_like(images)
    assert 0.5 < ovq.ssim(images, black) < 0.9  # three quarters of a slice are black: why brain_ssim stands beside
    assert ovq.brain_ssim(images, black) < 0.05


def test_scores_follow_their_definitions(images):
    noisy = np.clip(images + 0.1 * np.random.default_rng(0).normal(size=images.shape), 0, 1).astype(np.float32)
    pairs = list(zip(images[..., 0], noisy[..., 0], strict=True))
    maps = [structural_similarity(a, b, data_range=1, win_size=7, full=True) for a, b in pairs]
    assert ovq.ssim(images, noisy) == pytest.approx(np.mean([mean for mean, _ in maps]))
    brains = [part[a > 0.05].mean() for (a, _), (_, part) in zip(pairs, maps, strict=True)]
    assert ovq.brain_ssim(images, noisy) == pytest.approx(np.mean(brains))
    errors = (images.astype(np.float64) - noisy) ** 2
    assert ovq.psnr(images, noisy) == pytest.approx(10 * np.log10(1 / errors.mean()))
    assert ovq.brain_psnr(images, noisy) == pytest.approx(10 * np.log10(1 / errors[images > 0.05].mean()))
    with pytest.raises(ValueError, match="Received"):
        ovq.ssim(images, noisy[..., 0])


def test_images_of_another_range_are_refused(images, vqvae):
    """A score with the wrong range looks like one: 0.99 for two images from 0 to 255."""
    whole = (images * 255).astype(np.uint8)
    for score in (ovq.ssim, ovq.brain_ssim, ovq.psnr, ovq.brain_psnr):
        with pytest.raises(ValueError, match=r"float. Received: uint8 and uint8"):
            score(whole, whole)
        with pytest.raises(ValueError, match=r"References are in \[0, 1\]. Received: 0.0 to "):
            score(images * 255, images * 255)
        score(images, images * 1.5 - 0.2)  # what a decoder without a limit makes
    small = images[:, ::2, ::2]
    for wrong, said in (((small * 255).astype(np.uint8), "Received: uint8"), (small * 255, "Received: 0.0 to")):
        with pytest.raises(ValueError, match=said):
            vqvae.encode(wrong)
    with pytest.raises(ValueError, match="SSIM needs 7 pixels"):
        ovq.ssim(images[:, :6, :6], images[:, :6, :6])


def test_slices_without_brain_count_for_ssim_only(images):
    with_black = np.concatenate([images, np.zeros_like(images[:1])])
    assert ovq.brain_ssim(with_black, with_black) == pytest.approx(1)
    assert np.isnan(ovq.brain_ssim(with_black[-1:], with_black[-1:]))


def test_mean_slices_are_means_by_position(index):
    means = mean_slices(index.train, image_size=32)
    images = ovq.load_images(index.train, image_size=32)
    np.testing.assert_allclose(means[5], images[index.train.slice == 5].mean(0), atol=1e-6)
    np.testing.assert_allclose(means[-1], images.mean(0), atol=1e-6)


def test_reconstruction_report(index, vqvae):
    report = ovq.evaluate_reconstruction(vqvae, index.test)
    images = ovq.load_images(index.test, image_size=32)
    again = vqvae.reconstruct(images)
    for name in ("ssim", "brain_ssim", "psnr", "brain_psnr"):
        assert report[name] == pytest.approx(getattr(ovq, name)(images, again), rel=1e-6)
        low, high = report["intervals"][name]
        assert low <= report[name] <= high
    black = report["baselines"]["black"]
    assert black["ssim"] == pytest.approx(ovq.ssim(images, np.zeros_like(images)))
    assert report["baselines"]["mean_slice"]["brain_ssim"] > black["brain_ssim"]
    assert report["bits_per_image"] == 8 * 8 * 5
    assert report["codebook_usage"] == len(np.unique(vqvae.encode(images))) / 32
    assert (report["num_images"], report["num_subjects"]) == (16, 2)
    text = table(report)
    assert "An all-black image scores" in text and "mean_slice" in text
    positions = report["positions"]
    assert positions["slice"] == list(range(8))
    rows = index.test.slice == 3
    assert positions["model"]["brain_ssim"][3] == pytest.approx(ovq.brain_ssim(images[rows], again[rows]), rel=1e-6)
    assert positions["black"]["ssim"][3] == pytest.approx(ovq.ssim(images[rows], np.zeros_like(images[rows])))
    assert f"{min(positions['model']['brain_ssim']):.3f} (slice" in text


def test_report_on_slices_without_brain_is_valid_json(tmp_path, index, vqvae, monkeypatch):
    monkeypatch.setattr("oasis_vq.metrics.BRAIN_THRESHOLD", 2.0)
    report = ovq.evaluate_reconstruction(vqvae, index.test)
    assert np.isnan(report["brain_ssim"]) and np.isnan(report["positions"]["model"]["brain_ssim"]).all()
    write_json(tmp_path / "metrics.json", report)
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text)["brain_ssim"] is None and "NaN" not in text
    assert "By slice position" not in table(report)


def test_code_baselines_follow_their_definitions():
    generator = np.random.default_rng(0)
    train, test = generator.integers(0, 3, (50, 2, 2)), generator.integers(0, 3, (9, 2, 2))
    train[:, 0, 0] = 1
    baselines = code_baselines(train, test, 4)
    bits = []
    for grid in test:
        for row, column in np.ndindex(2, 2):
            matches = (train[:, row, column] == grid[row, column]).sum()
            bits.append(-np.log2((matches + 1) / (50 + 4)))
    assert baselines["per_position"] == pytest.approx(np.mean(bits))
    unigram = [-np.log2(((train == code).sum() + 1) / (200 + 4)) for code in test.ravel()]
    assert baselines["unigram"] == pytest.approx(np.mean(unigram)) and baselines["uniform"] == 2.0


def test_one_subject_has_no_interval(index, vqvae):
    one = index.test[index.test.subject == index.test.subject[0]]
    report = ovq.evaluate_reconstruction(vqvae, one, train=index.train)
    assert np.isfinite(report["brain_ssim"]) and np.isnan(report["intervals"]["brain_ssim"]).all()
    assert " - to -" in table(report)


def test_a_prior_is_not_told_slice_positions_that_it_does_not_know(vqvae, prior, index, capsys):
    """Another data set counts from 78 on: its slices cost what they cost without their position."""
    moved = index.test[:]
    moved = dataclasses.replace(moved, slice=moved.slice + 78)
    report = evaluate_prior(prior, vqvae, dataclasses.replace(index, test=moved))
    assert f"trained on no slices at {list(range(78, 86))}" in capsys.readouterr().out
    assert report["bits_per_code"] == pytest.approx(report["unconditional_bits_per_code"], rel=1e-6)
