"""Two levels: a prior that refines what a coarser one drafts."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from conftest import PRIOR_CONFIG, VQVAE_CONFIG
from model_card import card
from test_pixelcnn import ARCHITECTURES, randomised, some_codes
from test_sampling import cached_logits

import oasis_vq as ovq
from oasis_vq.__main__ import main
from oasis_vq.codes import encode_views
from oasis_vq.config import Augmentation
from oasis_vq.evaluation import table

COARSE_VQVAE = dataclasses.replace(VQVAE_CONFIG, downsampling=8, epochs=5)


def refining(name: str) -> ovq.PriorConfig:
    """An architecture of the tests on a 4x6 grid, given a draft."""
    return dataclasses.replace(ARCHITECTURES[name], grid_shape=(4, 6), refines=True)


def drafts(config: ovq.PriorConfig, count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.num_embeddings, (count, *config.grid_shape))


@pytest.fixture(scope="module")
def coarse_prior(train) -> ovq.PixelCNN:
    config = dataclasses.replace(PRIOR_CONFIG, epochs=5).matched_to(COARSE_VQVAE)
    return train("coarse-prior", config, vqvae=train("coarse", COARSE_VQVAE))


@pytest.fixture(scope="module")
def fine_prior(train, vqvae, coarse_prior) -> ovq.PixelCNN:
    config = dataclasses.replace(PRIOR_CONFIG, epochs=5, num_views=2, flip_left_right=True)
    return train("fine-prior", config, vqvae=vqvae, coarse=coarse_prior)


@pytest.mark.parametrize(
    "name",
    ["gated", "attentive", *(pytest.param(name, marks=pytest.mark.slow) for name in ("default", "gated_attentive"))],
)
def test_cached_logits_equal_the_full_forward_under_a_draft(name):
    config = refining(name)
    prior, codes, draft = randomised(config), some_codes(config, 3), drafts(config, 3)
    vectors = prior.of_draft.layers[0].embeddings  # they begin large: logits would be 100, with rounding to match
    vectors.assign(0.1 * vectors)
    full = prior.logits(codes, draft=draft)
    assert full.std() > 0.1
    np.testing.assert_allclose(cached_logits(prior, codes, draft=draft), full, atol=1e-4)
    if name != "gated":
        return
    drawn = ovq.sample_codes(prior, 3, draft=draft)
    np.testing.assert_array_equal(drawn, ovq.sample_codes(prior, 3, draft=draft, cached=False))


def test_a_position_hears_the_whole_draft_around_it_and_the_past_alone_of_the_codes():
    prior = randomised(refining("gated"))
    codes, draft = some_codes(prior.config, 1), drafts(prior.config, 1)
    before = prior.logits(codes, draft=draft)
    changed = draft.copy()
    changed[0, 2, 3] = (changed[0, 2, 3] + 1) % prior.config.num_embeddings
    moved = np.abs(prior.logits(codes, draft=changed) - before).max(axis=-1)[0]
    assert moved[1, 2] > 0 and moved[2, 3] > 0 and moved[3, 4] > 0  # before it, there, and after it
    codes[0, 2, 3] = (codes[0, 2, 3] + 1) % prior.config.num_embeddings
    after = prior.logits(codes, draft=draft).reshape(24, -1)
    np.testing.assert_array_equal(after[:16], before.reshape(24, -1)[:16])


def test_probabilities_sum_to_one_under_each_draft():
    prior = randomised(dataclasses.replace(refining("gated"), grid_shape=(2, 2), num_embeddings=2))
    grids = np.array(list(itertools.product((0, 1), repeat=4))).reshape(16, 2, 2)
    sums = [np.exp(prior.log_prob(grids, draft=np.repeat(draft[None], 16, axis=0))).sum() for draft in grids[::5]]
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_samples_are_those_of_the_coarse_prior_refined(fine_prior, coarse_prior, models):
    drawn = ovq.sample_codes(fine_prior, 5, seed=1)
    conditions = ovq.sampling.sample_conditions(fine_prior, 5, seed=1)
    draft = fine_prior.drafter.of_codes(ovq.sample_codes(coarse_prior, 5, seed=1, **conditions))
    np.testing.assert_array_equal(ovq.sample_codes(fine_prior, 5, seed=1, draft=draft), drawn)
    again = ovq.load_prior(models / "fine-prior")
    np.testing.assert_array_equal(ovq.sample_codes(again, 3, seed=1), drawn[:3])
    again = ovq.sample_codes(fine_prior, 5, seed=1, draft=draft, prefix=drawn[:, :4])
    np.testing.assert_array_equal(again, drawn)


def test_a_prior_hears_what_its_draft_tells(fine_prior, vqvae, index):
    """The drafts of the slices themselves tell more than those of other slices at the same position."""
    codes = ovq.encode_slices(vqvae, index.validate, drafter=fine_prior.drafter)
    images = ovq.load_images(index.validate, image_size=32)
    np.testing.assert_array_equal(codes.draft, vqvae.encode(fine_prior.drafter.coarse.reconstruct(images)))
    np.testing.assert_array_equal(codes.draft, fine_prior.drafter.of_images(images))
    own = ovq.code_scores(fine_prior, codes)[0].mean()
    compact = ovq.encode_slices(vqvae, index.validate, drafter=fine_prior.drafter, compact=True)
    assert compact.codes.dtype == np.uint8 and ovq.code_scores(fine_prior, compact)[0].mean() == own
    others = dataclasses.replace(codes, draft=np.roll(codes.draft, len(codes) // 2, axis=0))
    assert own < ovq.code_scores(fine_prior, others)[0].mean()


def test_a_coarse_prior_is_told_what_it_knows(fine_prior, index):
    """Not the positions that the fine one is told, if it was trained without."""
    untold = ovq.PixelCNN(dataclasses.replace(fine_prior.drafter.prior.config, num_slices=0))
    told, fine_prior.drafter = fine_prior.drafter, dataclasses.replace(fine_prior.drafter, prior=untold)
    try:
        assert ovq.sample_codes(fine_prior, 2, slice_index=3).shape == (2, 8, 8)
    finally:
        fine_prior.drafter = told


def test_scores_count_the_bits_of_both_grids(fine_prior, coarse_prior, vqvae, index):
    report = ovq.evaluate_prior(fine_prior, vqvae, index)
    below = ovq.evaluate_prior(coarse_prior, fine_prior.drafter.coarse, index)
    own = report["bits_per_code"] * math.prod(fine_prior.config.grid_shape)
    assert report["bits_per_image"] == pytest.approx(own + below["bits_per_image"])
    assert report["coarse_bits_per_image"] == pytest.approx(below["bits_per_image"])
    lines = {line.split()[0]: line.split()[1:] for line in table(report).splitlines() if line.strip()}
    score, low, _, *rest = lines["bits_per_code"]
    assert float(low) <= float(score) <= float(rest.pop(0))
    assert not rest  # baselines have no draft: they stand beside the bits of both grids
    assert float(lines["bits_per_image"][-1]) == pytest.approx(64 * report["baselines"]["per_position"], abs=1e-3)
    samples = ovq.evaluate_samples(fine_prior, vqvae, index, num=16, num_repeats=1)
    assert 0 <= samples["classifier_accuracy"] <= 1


def test_views_of_both_grids_are_of_the_same_changes(fine_prior, vqvae, index):
    mirrored = Augmentation(flip_left_right=True)
    both = encode_views(vqvae, index.train, mirrored, 2, drafter=fine_prior.drafter)
    np.testing.assert_array_equal(both.coarse, encode_views(fine_prior.drafter.coarse, index.train, mirrored, 2).codes)
    np.testing.assert_array_equal(both.codes, encode_views(vqvae, index.train, mirrored, 2).codes)


def test_codes_of_both_grids_come_back_from_disk(tmp_path, fine_prior, vqvae, index):
    codes = ovq.encode_slices(vqvae, index.test, drafter=fine_prior.drafter)
    codes.save(tmp_path / "codes.npz")
    np.testing.assert_array_equal(ovq.Codes.load(tmp_path / "codes.npz").draft, codes.draft)
    assert codes[:3].coarse.shape == (3, 4, 4) and codes[:3].draft.shape == (3, 8, 8)


def test_commands_train_and_draw_two_levels(tmp_path, cohort, models, coarse_prior, vqvae):
    out = tmp_path / "two"
    levels = ["--vqvae", str(models / "small"), "--coarse", str(models / "coarse-prior")]
    command = ["train-prior", "--data", str(cohort), *levels, "--recipe", "keras_io", "--epochs", "1"]
    assert main([*command, "--out", str(out)]) == 0
    assert main(["generate", "--prior", str(out), "-n", "2", "--out", str(tmp_path / "new")]) == 0
    provenance = json.loads((tmp_path / "new" / "provenance.json").read_text())
    assert provenance["models"].keys() == {"small", "two", "coarse", "coarse-prior"}
    told = card(out, "Made-up people.", "one core")
    assert f"--coarse {models / 'coarse-prior'} --epochs 1 --out" in told
    assert "it refines the samples of [coarse-prior](../coarse-prior)" in told


def test_one_level_where_two_are_meant_is_told(tmp_path, index, capsys):
    for refines in (True, False):
        with pytest.raises(ValueError, match="A prior needs the VQ-VAE"):
            ovq.fit_or_load(tmp_path / "p", dataclasses.replace(PRIOR_CONFIG, refines=refines), index)
        assert ("without that (--coarse) it has one level" in capsys.readouterr().out) == refines


def test_completions_keep_the_rows_of_both_grids(fine_prior, vqvae, index):
    explorer = ovq.explore_completions(fine_prior, vqvae, index.test)
    values = explorer.values()
    rows = (index.test.subject == values["subject"]) & (index.test.slice == values["position"])
    known = vqvae.encode(ovq.load_images(index.test[rows], image_size=32))
    assert (explorer.codes[:, :4] == known[:, :4]).all() and (explorer.codes[:, 4:] != known[:, 4:]).any()


def test_what_does_not_fit_is_told(tmp_path, index, models, vqvae, prior, coarse_prior, fine_prior):
    config, codes = PRIOR_CONFIG, np.zeros((2, 8, 8), np.int32)
    with pytest.raises(ValueError, match="refines a draft"):
        fine_prior.logits(codes)
    with pytest.raises(ValueError, match=r"without a draft. Received: draft \(2, 8, 8\)"):
        prior.logits(codes, draft=codes)
    with pytest.raises(ValueError, match="a draft for each of 2 grids"):
        fine_prior.logits(codes, draft=np.zeros((3, 8, 8), np.int32))
    with pytest.raises(ValueError, match="completes under given ones"):
        ovq.sample_codes(fine_prior, 2, prefix=codes[:, :3])
    for below, folder, text in (
        (fine_prior, "p", "two levels at most"),
        (prior, "p", "downsamples more than the fine one. Received: 4x below 4x"),
        (coarse_prior, models / "coarse-prior", "refines another one"),
    ):
        with pytest.raises(ValueError, match=text):
            ovq.fit_or_load(tmp_path / folder, config, index, vqvae=vqvae, coarse=below)
    with pytest.raises(ValueError, match="refines: True, not False"):
        ovq.fit_or_load(models / "fine-prior", config, index, vqvae=vqvae)
    for name in ("small", "fine-prior", "coarse", "coarse-prior"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "coarse-prior" / "model.keras").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"is not the prior whose grids the prior .*fine-prior refines"):
        ovq.load_prior(tmp_path / "fine-prior")
