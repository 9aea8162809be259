"""Real slices, where there are any (OASIS_VQ_REAL_DATA), and the sizes of real work."""

import contextlib
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oasis_vq as ovq
from oasis_vq.guard import check_readable


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
def test_few_people_in_small_batches_are_learned(real_data, tmp_path):
    """With the whole SSIM from the first step on, the decoder stayed black."""
    config = dataclasses.replace(ovq.recipe("default128").vqvae, learning_rate=5e-4, batch_size=4, epochs=3)
    index = ovq.find_slices(real_data, limit_train=16)
    images = ovq.load_images(index.validate[:64], image_size=128)
    again = ovq.fit_or_load(tmp_path / "few", config, index).reconstruct(images)
    assert ovq.brain_ssim(images, again) > 0.35


@pytest.fixture(scope="module")
def large_cohort(tmp_path_factory):
    """The folder of 354 subjects at 256x256, as many as OASIS has, and the seconds they took."""
    start = time.monotonic()
    folder = ovq.make_cohort(tmp_path_factory.mktemp("large") / "cohort")
    return folder, time.monotonic() - start


@pytest.mark.slow
def test_a_cohort_of_the_size_of_oasis_takes_minutes(large_cohort):
    folder, seconds = large_cohort
    assert seconds < 360
    assert [len(part) for part in ovq.find_slices(folder).splits().values()] == [9664, 1120, 544]


def peak_memory(words: list[str]) -> int:
    """Run a command, and return the most anonymous memory (RssAnon) it was seen to have, in kB."""
    process = subprocess.Popen([sys.executable, "-m", "oasis_vq", *map(str, words)])
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("cache", [False, True])
def test_memory_of_training_does_not_grow_with_the_cohort(large_cohort, tmp_path, cache):
    tenth = ovq.make_cohort(tmp_path / "tenth", num_subjects=35)
    options = ["--recipe", "keras_io", "--image-size", 256, "--batch-size", 16, "--epochs", 1, *["--cache"] * cache]
    small, large = (
        peak_memory(["train-vqvae", "--data", data, "--out", tmp_path / name, *options])
        for data, name in ((tenth, "s"), (large_cohort[0], "l"))
    )
    print(f"\nRssAnon at its peak: {small / 1e3:.0f} MB with 35 subjects, {large / 1e3:.0f} MB with 354")
    assert large < 1.1 * small
