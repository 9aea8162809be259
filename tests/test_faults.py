"""Planted faults in a training: each is told, what was kept stays whole, and the same call goes on."""

import contextlib
import dataclasses
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import VQVAE_CONFIG
from test_training import Stop

import oasis_vq as ovq
from oasis_vq import training
from oasis_vq.callbacks import LivingDecoder
from oasis_vq.folders import load_model
from oasis_vq.training import _stoppable
from oasis_vq.workers import alone

CONFIG = dataclasses.replace(VQVAE_CONFIG, epochs=4)


class Plant(keras.callbacks.Callback):
    """Does something as an epoch, counted from 0, begins."""

    def __init__(self, epoch, what):
        super().__init__()
        self.epoch, self.what = epoch, what

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.what(self.model)


@pytest.fixture(scope="module")
def whole(train):
    """The model of a training without a fault."""
    return train("whole", CONFIG)


def assert_ends_as(whole, folder, index):
    again = ovq.fit_or_load(folder, CONFIG, index)
    assert ovq.read_history(folder)["epoch"].tolist() == [1, 2, 3, 4]
    for one, other in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loss_that_is_not_a_number_stops_and_leaves_the_last_good_state(tmp_path, index, whole):
    def spoil(model):
        kernel = model.encoder.trainable_weights[0]
        kernel.assign(kernel * np.nan)

    with pytest.raises(FloatingPointError, match=r"v: \w+ is nan in step 1 of epoch 3, at .*epoch 2"):
        ovq.fit_or_load(tmp_path / "v", CONFIG, index, callbacks=[Plant(2, spoil)])
    assert_ends_as(whole, tmp_path / "v", index)
    log = (tmp_path / "v" / "log.txt").read_text().splitlines()
    told = ["training from epoch 1 to 4", "FloatingPointError: v: ", "training from epoch 3 to 4", "v: 4 epochs in"]
    assert len(log) == 4 and all(text in line for text, line in zip(told, log, strict=True))


def test_decoder_that_dies_stops_and_leaves_the_last_good_state(tmp_path, index, whole):
    """Seen: default128 with 64 codes in bfloat16 drew a black image from its second epoch on, for ten more."""

    def kill(model):
        for weight in model.decoder.trainable_weights[-4:]:
            weight.assign(-tf.abs(weight) - 1)

    with pytest.raises(FloatingPointError, match=r"v: the decoder draws the same for every slice in epoch 4 .*epoch 3"):
        ovq.fit_or_load(tmp_path / "v", CONFIG, index, callbacks=[Plant(3, kill)])
    assert_ends_as(whole, tmp_path / "v", index)


def test_learning_rate_that_is_too_high_is_told(tmp_path, index):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"epoch 1, at a learning rate of .*No epoch is done"):
        ovq.fit_or_load(tmp_path / "v", config, index)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("spoilt", ["data-00000-of-00001", pytest.param("index", marks=pytest.mark.slow)])
def test_broken_checkpoint_falls_back_to_the_one_before(tmp_path, index, whole, capsys, spoilt):
    with pytest.raises(KeyboardInterrupt, match="v: 3 of 4 epochs are kept"):
        ovq.fit_or_load(tmp_path / "v", CONFIG, index, callbacks=[Stop(3)])
    folder = tmp_path / "v.partial" / "checkpoints"
    file, other = folder / f"ckpt-3.{spoilt}", folder / "ckpt-2.index"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    kept = other.read_bytes()
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint .* can be read: .*--restart"):
        ovq.fit_or_load(tmp_path / "v", CONFIG, index)
    other.write_bytes(kept)
    capsys.readouterr()
    assert_ends_as(whole, tmp_path / "v", index)
    said = capsys.readouterr().out
    assert "ckpt-3 cannot be read" in said and "going on after epoch 2 of 4" in said


FULL = """
import pathlib, resource, sys
sys.path.insert(0, {tests!r})
from test_faults import CONFIG, Plant
import oasis_vq as ovq
fill = lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    ovq.fit_or_load(pathlib.Path({folder!r}), CONFIG, ovq.find_slices({cohort!r}), callbacks=[Plant(2, fill)])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_full_disk_is_told_and_leaves_the_last_good_state(tmp_path, index, cohort, whole):
    """Files of more than 20 kB cannot be written from the third epoch on: no checkpoint can."""
    code = FULL.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "v"), cohort=str(cohort))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "no checkpoint could be written after epoch 3" in ended.stdout, ended.stderr
    assert_ends_as(whole, tmp_path / "v", index)


def test_folder_that_cannot_be_written_is_told_before_any_work(tmp_path, index):
    (tmp_path / "a file").write_text("in the way")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'a file'} cannot be written")):
        ovq.fit_or_load(tmp_path / "a file" / "v", CONFIG, index)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_place_where_nothing_can_be_locked_is_not_waited_for():
    with pytest.raises(OSError, match=r"^/proc cannot be written \(.*\): choose another"), alone(Path("/proc/x")):
        pass


HOLD = """
import pathlib, sys, time
from oasis_vq.workers import alone
with alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_model_that_another_process_trains_is_left_alone_until_that_is_killed(tmp_path, index):
    config, theirs = dataclasses.replace(CONFIG, epochs=1), tmp_path / "v.partial" / "history.csv"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "v"], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            for restart in (False, True):
                with pytest.raises(OSError, match=r"^Another process makes .*v: wait for it, or .* \(--out\)\.$"):
                    ovq.fit_or_load(tmp_path / "v", config, index, restart=restart)
            assert list(theirs.parent.iterdir()) == [theirs] and theirs.read_text() == "theirs"
        finally:
            other.kill()
    ovq.fit_or_load(tmp_path / "v", config, index, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["v"] and not list((tmp_path / "v").glob("*lock*"))


def test_full_memory_names_the_batch_size(tmp_path):
    with (
        pytest.raises(MemoryError, match=r"v: a batch of 8 does not fit into memory.*--batch-size"),
        _stoppable(tmp_path / "v.partial", CONFIG),
    ):
        tf.fill((2**46,), 0.0).numpy()  # more than a process can address


def test_code_in_a_model_file_is_refused(tmp_path, models, vqvae):
    """A Lambda layer holds Python code that loading would run."""
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "config.json").write_bytes((models / "small" / "config.json").read_bytes())
    keras.Sequential([keras.Input((1,)), keras.layers.Lambda(lambda x: x + 1)]).save(folder / "model.keras")
    with pytest.raises(ValueError, match=r"model.keras cannot be loaded .*[Ll]ambda"):
        ovq.load_vqvae(folder)


def test_pickled_objects_in_codes_are_refused(tmp_path):
    np.savez(tmp_path / "codes.npz", codes=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        ovq.Codes.load(tmp_path / "codes.npz")


LONG = """
import dataclasses, pathlib, sys
sys.path.insert(0, {tests!r})
from oasis_vq.runtime import start_tensorflow
start_tensorflow(deterministic=True)
from conftest import PRIOR_CONFIG, VQVAE_CONFIG
import oasis_vq as ovq
index, folder = ovq.find_slices({cohort!r}), pathlib.Path({folder!r})
if {kind!r} == "prior":
    config = dataclasses.replace(PRIOR_CONFIG, epochs=60, architecture="gated", weight_average=0.9, clip_norm=1.0)
    ovq.fit_or_load(folder, config, index, vqvae=ovq.load_vqvae({vqvae!r}))
else:
    ovq.fit_or_load(folder, dataclasses.replace(VQVAE_CONFIG, epochs=60, quantizer={kind!r}), index)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradient", "ema", "prior"])
def test_training_killed_twenty_times_ends_bit_identical(tmp_path, cohort, models, vqvae, kind):
    """The moments are random: while it starts, in steps, validations, and while checkpoints are written."""

    def start(name):
        code = LONG.format(
            tests=str(Path(__file__).parent), cohort=str(cohort), folder=str(tmp_path / name), kind=kind,
            vqvae=str(models / "small"),
        )  # fmt: skip
        with (tmp_path / f"{name}.log").open("w") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)

    assert start("whole").wait() == 0, (tmp_path / "whole.log").read_text()
    generator, num_epochs = random.Random(0), 0
    for kill in range(20):
        process, partial = start("killed"), tmp_path / "killed.partial"
        begun = time.monotonic()
        while kill % 5 and process.poll() is None and time.monotonic() < begun + 120:  # every fifth dies as it starts
            history = partial / "history.csv"
            if history.exists() and len(history.read_text().splitlines()) > num_epochs + 1:
                break
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.8))
        process.kill()
        assert process.wait() != 0, f"it was done before kill {kill + 1}: more epochs are needed"
        num_epochs = len((partial / "history.csv").read_text().splitlines()) - 1 if kill else 0
    assert start("killed").wait() == 0, (tmp_path / "killed.log").read_text()
    one, other = (
        load_model(tmp_path / name, "PixelCNN" if kind == "prior" else "VQVAE") for name in ("whole", "killed")
    )
    for value, expected in zip(other.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)
    first, second = (ovq.read_history(tmp_path / name) for name in ("whole", "killed"))
    for column in set(first) - {"seconds"}:
        np.testing.assert_array_equal(second[column], first[column])


MEMORY = """
import dataclasses, pathlib, sys
sys.path.insert(0, {tests!r})
from conftest import PRIOR_CONFIG, VQVAE_CONFIG
import keras
import oasis_vq as ovq

class Watch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        print("anonymous", next(line.split()[1] for line in lines if line.startswith("RssAnon:")), flush=True)

index, folder = ovq.find_slices({cohort!r}), pathlib.Path({folder!r})
if {kind!r} == "vqvae":
    ovq.fit_or_load(folder / "v", VQVAE_CONFIG, index, callbacks=[Watch()])
else:
    ovq.fit_or_load(folder / "p", PRIOR_CONFIG, index, vqvae=ovq.load_vqvae({vqvae!r}), callbacks=[Watch()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["vqvae", "prior"])
def test_memory_does_not_grow_over_the_epochs(tmp_path, cohort, models, vqvae, kind):
    code = MEMORY.format(
        tests=str(Path(__file__).parent), cohort=str(cohort), folder=str(tmp_path), kind=kind,
        vqvae=str(models / "small"),
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory = [int(number) for number in re.findall(r"anonymous (\d+)", ended.stdout)]
    assert len(memory) == 20 and memory[19] < 1.02 * memory[1], memory


def test_one_validation_slice_does_not_look_like_a_dead_decoder(tmp_path, index):
    """Of one image all that is drawn is the same."""
    callback = LivingDecoder(tmp_path / "v", SimpleNamespace(score=0.5), ovq.load_images(index.test[:1], image_size=32))
    callback.set_model(ovq.VQVAE(CONFIG))
    callback.on_test_end({"reconstruction_loss": 1.0})


def test_a_model_that_another_process_has_finished_meanwhile_is_loaded(tmp_path, index, whole, monkeypatch):
    """Between the first look and the lock."""

    @contextlib.contextmanager
    def after_the_other(folder, **options):
        shutil.copytree(whole.folder, folder)
        yield

    monkeypatch.setattr(training, "alone", after_the_other)
    before = (whole.folder / "model.keras").read_bytes()
    model = ovq.fit_or_load(tmp_path / "v", CONFIG, index)
    assert (model.folder / "model.keras").read_bytes() == before and not (tmp_path / "v.partial").exists()
