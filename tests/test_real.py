"""Real slices, where there are any (OASIS_VQ_REAL_DATA), and the sizes of real work."""

import dataclasses
import time

import pytest

import oasis_vq as ovq
from oasis_vq.slices import check_readable


def test_real_slices_are_found_and_readable(real_data):
    index = ovq.find_slices(real_data)
    assert min(len(part) for part in index.splits().values()) > 100
    check_readable(index.validate)
    images = ovq.load_images(index.validate[::37], image_size=128)
    assert 0.6 < (images <= 0.05).mean() < 0.9  # three quarters of a brain slice are background


@pytest.mark.slow
def test_a_few_epochs_on_real_brains_beat_the_baselines(real_data, tmp_path):
    index = ovq.find_slices(real_data)
    config = dataclasses.replace(ovq.recipe("default128").vqvae, image_size=64, downsampling=4, epochs=4)
    vqvae = ovq.fit_or_load(tmp_path / "real", config, index)
    report = ovq.evaluate_reconstruction(vqvae, index.validate, train=index.train)
    assert report["brain_ssim"] > report["baselines"]["mean_slice"]["brain_ssim"] + 0.05
    assert report["codebook_usage"] > 0.5


@pytest.mark.slow
def test_a_cohort_of_the_size_of_oasis_takes_minutes(tmp_path):
    start = time.monotonic()
    index = ovq.find_slices(ovq.make_cohort(tmp_path / "cohort"))
    assert time.monotonic() - start < 360
    assert [len(part) for part in index.splits().values()] == [9664, 1120, 544]
