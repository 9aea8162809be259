"""Training by several processes, which are one training: same history, same codebooks, and it resumes."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import VQVAE_CONFIG

import oasis_vq as ovq
from oasis_vq.devices import even_batch_size, make_strategy
from oasis_vq.folders import load_model
from oasis_vq.training import _require_shares

WORKER = """
import dataclasses, pathlib, sys
sys.path.insert(0, {tests!r})
from conftest import PRIOR_CONFIG, VQVAE_CONFIG
import keras
import oasis_vq as ovq

strategy = None
if {workers!r}:  # before any operation of TensorFlow
    index, (first, *others) = int(sys.argv[1]), {workers!r}
    if {chief}:
        import json, os
        task = dict(type="worker", index=index - 1) if index else dict(type="chief", index=0)
        os.environ["TF_CONFIG"] = json.dumps(dict(cluster=dict(chief=[first], worker=others), task=task))
        strategy = ovq.make_strategy("multiworker")
    else:
        strategy = ovq.make_strategy("multiworker", workers=[first, *others], index=index)
if sys.argv[1] == "mirrored":
    import tensorflow as tf
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

class Tell(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if {kind!r} == "ema":
            print("codebook", epoch, self.model.quantizer.codebook.numpy().astype("float64").sum().hex(), flush=True)

index, folder = ovq.find_slices({cohort!r}), pathlib.Path(sys.argv[2])
if {kind!r} == "prior":
    steady = dict(dropout=0.0, condition_dropout=0.5, weight_average=0.9, clip_norm=1.0)
    config = dataclasses.replace(PRIOR_CONFIG, epochs=6, architecture="gated", **steady)
    ovq.fit_or_load(folder, config, index, vqvae=ovq.load_vqvae({vqvae!r}), strategy=strategy)
else:
    config = dataclasses.replace(VQVAE_CONFIG, epochs=6, quantizer={kind!r}, warmup_steps=6)
    ovq.fit_or_load(folder, config, index, callbacks=[Tell()], strategy=strategy)
"""


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


@pytest.fixture
def start(tmp_path, cohort, models, request):
    """A function that starts the processes of a training; what they print is in <name>-<index>.log."""
    started = []

    def start(name, kind, count, mirrored=False, chief=False, folders=()):
        workers = free_addresses(count) if count > 1 else []
        if kind == "prior":
            request.getfixturevalue("vqvae")
        code = WORKER.format(
            tests=str(Path(__file__).parent), cohort=str(cohort), kind=kind, vqvae=str(models / "small"),
            workers=workers, chief=chief,
        )  # fmt: skip
        processes = []
        for index in range(count):
            with (tmp_path / f"{name}-{index}.log").open("a") as log:
                folder = tmp_path / (folders[index] if folders else name)
                command = [sys.executable, "-c", code, "mirrored" if mirrored else str(index), str(folder)]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()


def assert_same_training(tmp_path, kind, count):
    one, many = (ovq.read_history(tmp_path / name) for name in ("one", "many"))
    assert set(one) == set(many) and many["epoch"].tolist() == list(range(1, count + 1))
    for column in set(one) - {"seconds"}:
        np.testing.assert_allclose(many[column], one[column], rtol=1e-3, err_msg=column)
    if kind != "prior":
        np.testing.assert_array_equal(many["val_codebook_usage"], one["val_codebook_usage"])
    models = [load_model(tmp_path / name, "PixelCNN" if kind == "prior" else "VQVAE") for name in ("one", "many")]
    for first, second in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(second, first, rtol=0.02, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "gradient", "prior"])
def test_two_workers_train_as_one(tmp_path, start, kind):
    assert start("one", kind, 1)[0].wait() == 0, (tmp_path / "one-0.log").read_text()
    for index, process in enumerate(start("many", kind, 2)):
        assert process.wait(timeout=300) == 0, (tmp_path / f"many-{index}.log").read_text()
    assert_same_training(tmp_path, kind, 6)
    if kind == "ema":
        logs = [(tmp_path / f"many-{index}.log").read_text() for index in range(2)]
        told = [re.findall(r"codebook \d \S+", log) for log in logs]
        assert len(told[0]) == 6 and told[0] == told[1]


@pytest.mark.slow
def test_two_devices_of_a_machine_train_as_one(tmp_path, start):
    one, many = start("one", "ema", 1)[0], start("many", "ema", 1, mirrored=True)[0]
    for name, process in (("one", one), ("many", many)):
        assert process.wait(timeout=300) == 0, (tmp_path / f"{name}-0.log").read_text()
    assert_same_training(tmp_path, "ema", 6)


def wait_for_epochs(folder, count, *processes):
    while not ((folder / "history.csv").exists() and len((folder / "history.csv").read_text().splitlines()) > count):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
def test_training_goes_on_after_a_worker_was_killed(tmp_path, start):
    """The workers are told by TF_CONFIG, with a job for the chief."""
    assert start("one", "ema", 1)[0].wait() == 0, (tmp_path / "one-0.log").read_text()
    chief, other = start("many", "ema", 2, chief=True)
    wait_for_epochs(tmp_path / "many.partial", 2, chief, other)
    other.kill()
    time.sleep(2)
    chief.kill()  # as a cluster does with the rest of the job
    for index, process in enumerate(start("many", "ema", 2, chief=True)):
        assert process.wait(timeout=300) == 0, (tmp_path / f"many-{index}.log").read_text()
    assert "going on after epoch" in (tmp_path / "many-0.log").read_text()
    assert_same_training(tmp_path, "ema", 6)


@pytest.mark.slow
def test_workers_that_do_not_see_the_same_folder_stop(tmp_path, start):
    """The second finds no checkpoint, and would train from the first epoch on."""
    alone = start("many", "ema", 1)[0]
    wait_for_epochs(tmp_path / "many.partial", 2, alone)
    alone.kill()
    alone.wait()
    for index, process in enumerate(start("many", "ema", 2, folders=["many", "elsewhere/many"])):
        assert process.wait(timeout=300) == 1
        assert "The workers have read different checkpoints" in (tmp_path / f"many-{index}.log").read_text()
    assert len(ovq.read_history(tmp_path / "many.partial")["epoch"]) >= 2 and not (tmp_path / "many").exists()


def test_who_the_workers_are_must_be_known(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match="--workers, --index"):
        make_strategy("multiworker")
    with pytest.raises(ValueError, match=r"index is from 0 to 1, one for each worker. Received: 2"):
        make_strategy("multiworker", workers=["a:1", "b:1"], index=2)
    with pytest.raises(ValueError, match="given together, to the strategy multiworker"):
        make_strategy("mirrored", workers=["a:1", "b:1"], index=0)
    with pytest.raises(ValueError, match="given together, to the strategy multiworker"):
        make_strategy("multiworker", index=0)
    assert "TF_CONFIG" not in os.environ


def test_batches_that_devices_cannot_share_are_refused(index):
    for changed in ({"batch_size": 9}, {"batch_size": 50}, {"precision": "mixed_float16"}, {"batch_norm": True}):
        with pytest.raises(ValueError, match=rf"On several devices {next(iter(changed))} is"):
            _require_shares(dataclasses.replace(VQVAE_CONFIG, **changed), index, 2)
    few = dataclasses.replace(index, validate=index.validate[:1])
    with pytest.raises(ValueError, match=r"2 devices share the slices of validation. Received: 1"):
        _require_shares(VQVAE_CONFIG, few, 2)
    _require_shares(VQVAE_CONFIG, index, 2)


@pytest.mark.parametrize(
    ("num_items", "batch_size", "num_devices", "even"),
    [(1120, 128, 2, 112), (16, 8, 2, 8), (17, 8, 2, 8), (7, 8, 4, 4)],
)
def test_validation_leaves_out_less_than_one_slice_a_device(num_items, batch_size, num_devices, even):
    assert even_batch_size(num_items, batch_size, num_devices) == even
    assert num_items % even < num_devices
