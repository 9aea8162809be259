"""Training: `fit_or_load`, the one door to long work, and how it resumes.

A model folder is built beside its place, in `<name>.partial`, and renamed when it is complete: what has the name is
whole.
"""

import contextlib
import importlib.util
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from oasis_vq import __version__
from oasis_vq.callbacks import BestWeights, FiniteLoss, LivingDecoder, TrainingLog
from oasis_vq.config import PriorConfig, VQVAEConfig
from oasis_vq.devices import even_batch_size, is_chief, spread, wait_for_all
from oasis_vq.files import compress, write_json
from oasis_vq.folders import RESTARTED, in_use, load_model, model_folder, new_record, read_history, refuse_other
from oasis_vq.guard import checked
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.preparation import CODES, Training, prepare_prior, prepare_vqvae
from oasis_vq.runtime import gradient_slowdown
from oasis_vq.slices import SliceIndex
from oasis_vq.vqvae import VQVAE
from oasis_vq.workers import alone, partial_of


def fit_or_load(
    name: str | Path,
    config: VQVAEConfig | PriorConfig,
    index: SliceIndex,
    *,
    vqvae: VQVAE | None = None,
    coarse: PixelCNN | None = None,
    restart: bool = False,
    cache: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    strategy: tf.distribute.Strategy | None = None,
) -> VQVAE | PixelCNN:
    """Load the model of this name if it has been trained with this configuration, else train it.

    A training that was interrupted, by Ctrl-C, SIGTERM or a crash, goes on after its last finished epoch when it is
    asked for again. The model is that of the epoch with the best validation score.

    Args:
        name: of a folder in `Paths.models`, or a path.
        config: what to train; a prior's slice positions and labels are set to those of the data.
        index: the slices; train is trained on, validate is scored after every epoch, test is left alone.
        vqvae: for a prior, the VQ-VAE whose codes it learns; one that `fit_or_load` or `load_vqvae` has returned.
        coarse: for a prior, the one whose samples it refines, over the codes of a coarser VQ-VAE; likewise loaded. It
            sets the configuration's `refines`.
        restart: whether to train anew; what has been trained under this name is kept until the new model is complete.
            A training that was begun so and stopped goes on, if nothing else is asked for; to begin that anew,
            remove its `<name>.partial`.
        cache: whether a VQ-VAE reads its slices from a file of decoded ones (`cached_images`).
        callbacks: of Keras, beside what is always there: history.csv, log.txt and checkpoints; reconstructions.png,
            slices of validate over their reconstructions, or a prior's samples.png; TensorBoard's logs if it is
            installed.
        strategy: of `make_strategy`: spreads each batch over several devices; an epoch leaves out what does not fill a
            batch. Every process of a multi-worker training makes the same call, with the same folders.

    Raises:
        ValueError: if a model of this name has another configuration, data or VQ-VAE; both values are named. If the
            path is `.` or `..`. If the data guard finds an error. If no checkpoint can be read, or the workers read
            different ones. If the batch size is no multiple of the devices, or several are to train what only one can.
        FloatingPointError: if the loss is not a number, or a decoder that had learned draws one image for all slices;
            the checkpoints of the epochs before stay.
        MemoryError: if a batch does not fit into memory.
        OSError: if the folder cannot be written, the disk is full, or another process trains this model.
    """
    if isinstance(config, PriorConfig):
        if config.refines and coarse is None:
            print(
                "note: this prior is meant to refine what a coarse one draws; without that (--coarse) it has one level"
            )
        config = replace(config.conditioned_by(index), refines=coarse is not None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        strategy = tf.distribute.get_strategy()
    _require_shares(config, index, strategy.num_replicas_in_sync)
    leads = is_chief(strategy)
    folder = model_folder(name)
    partial = partial_of(folder)
    record = new_record(config, index, folder, vqvae, coarse)
    restarted = partial / RESTARTED
    if in_use(folder):
        refuse_other(folder, record, restart=restart)
        if not restart:
            if restarted.exists():
                print(f"note: what is to replace {folder.name} was stopped: restart=True (--restart) goes on with it")
            return load_model(folder, record["model"])
    if not restart and in_use(partial) and _checkpoints(partial):
        refuse_other(partial, record, restart=False)

    _require_writable(folder.parent)
    locked = alone(folder, waits=False) if leads else contextlib.nullcontext()
    with locked, _logged(partial if leads else None), _stoppable(partial, config):
        if strategy.num_replicas_in_sync == 1 and not restart and in_use(folder):  # since another call has finished it
            refuse_other(folder, record, restart=False)
            return load_model(folder, record["model"])
        for note in checked(index):  # a notebook keeps what is printed: no place of this machine
            print(f"note: {note}".replace(str(index.root), index.root.name))
        if config.precision != "float32" and (times := gradient_slowdown(config.precision)) > 2:
            print(
                f"note: gradients take {times:.0f} times as long in {config.precision} as in float32 on this machine: "
                "better stop, and train in float32 (--precision float32)"
            )
        keras.utils.set_random_seed(config.seed)
        wait_for_all(strategy)
        if leads:
            if restart and not (restarted.exists() and _is_of(partial, record)):
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            write_json(partial / "config.json", record)
            if restart:
                restarted.touch()
        wait_for_all(strategy)
        if vqvae is None:
            training = prepare_vqvae(config, index, partial, cache=cache, strategy=strategy)
        else:
            training = prepare_prior(config, index, partial, vqvae=vqvae, coarse=coarse, strategy=strategy)
        wait_for_all(strategy)
        if leads:
            _fit(training, partial, partial, callbacks)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
            (folder / RESTARTED).unlink(missing_ok=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for file in folder.glob(CODES):
                file.unlink()
        else:
            with tempfile.TemporaryDirectory() as own:
                _fit(training, partial, Path(own), callbacks)
        wait_for_all(strategy)
    return load_model(folder, record["model"])


def _is_of(partial: Path, record: dict) -> bool:
    """Return whether a training that was begun is the one that is asked for."""
    try:
        refuse_other(partial, record, restart=False)
    except (ValueError, FileNotFoundError):
        print(f"note: what was begun of {partial.stem} was something else, and is given up")
        return False
    return True


def _require_shares(config: VQVAEConfig | PriorConfig, index: SliceIndex, num_devices: int) -> None:
    """Raise ValueError if a training cannot be spread over so many devices."""
    if num_devices == 1:
        return
    if config.batch_size % num_devices or config.batch_size > len(index.train):
        raise ValueError(
            f"On several devices batch_size is a multiple of their number ({num_devices}), and at most that of the "
            f"training slices ({len(index.train)}). Received: {config.batch_size}."
        )
    if num_devices > len(index.validate):
        raise ValueError(f"{num_devices} devices share the slices of validation. Received: {len(index.validate)}.")
    if config.precision == "mixed_float16":  # Keras looks for overflows on one device alone
        raise ValueError("On several devices precision is float32 or mixed_bfloat16. Received: mixed_float16.")
    if getattr(config, "batch_norm", False):  # each would have its own moving statistics, and one be saved
        raise ValueError("On several devices batch_norm is False. Received: True.")


def _require_writable(folder: Path) -> None:
    """Make a folder if it is not there, and raise OSError if nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from None


def _log(folder: Path | None, text: str) -> None:
    """Append a line to log.txt of a folder, with the time, if it can be written."""
    if folder is not None and folder.is_dir():
        with contextlib.suppress(OSError), (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@contextlib.contextmanager
def _logged(folder: Path | None) -> Iterator[None]:
    """Log what ends a training before its end."""
    try:
        yield
    except BaseException as error:
        _log(folder, f"{type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def _stoppable(folder: Path, config: VQVAEConfig | PriorConfig) -> Iterator[None]:
    """Let SIGTERM, as clusters send it, stop a training as Ctrl-C does, and say how it goes on; explain a full memory.

    Python hears a signal when TensorFlow returns: after the current step.
    """

    def stop(*_) -> None:
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        done = max(_checkpoints(folder), default=0)
        raise KeyboardInterrupt(
            f"{folder.stem}: {done} of {config.epochs} epochs are kept, and the same call goes on after them."
        ) from None
    except tf.errors.ResourceExhaustedError as error:
        if "OOM" not in str(error):
            raise  # a full disk is one, too
        raise MemoryError(
            f"{folder.stem}: a batch of {config.batch_size} does not fit into memory. Use a smaller batch "
            "(--batch-size), or a smaller network or image; restart=True (--restart) if epochs are done."
        ) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fit(training: Training, folder: Path, own_folder: Path, callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Train in a folder, from its last checkpoint on if there is one, and leave the finished model there.

    A worker that is not the chief has a folder of its own to write to, and leaves nothing.
    """
    model, config, leads = training.model, training.model.config, folder == own_folder
    epoch = tf.Variable(0, dtype=tf.int64)
    # By list, not by object: the states of random generators, such as dropout's, are variables that objects leave out.
    state = [variable.value for variable in (*model.variables, *model.optimizer.variables)]
    best = BestWeights(model, training.patience)
    checkpoint = tf.train.Checkpoint(state=state, epoch=epoch, best=best.variables)
    manager = tf.train.CheckpointManager(checkpoint, str(own_folder / "checkpoints"), max_to_keep=2)
    if _restored(checkpoint, folder):
        print(f"{folder.stem}: going on after epoch {int(epoch)} of {config.epochs}")
    versions = f"oasis_vq {__version__}, TensorFlow {tf.__version__}"
    _log(own_folder, f"training from epoch {int(epoch) + 1} to {config.epochs} with {versions}")
    first_epoch, strategy, size = int(epoch), model.distribute_strategy, config.batch_size
    wait_for_all(strategy, first_epoch)
    followers = [FiniteLoss(folder), *callbacks, best]
    if isinstance(model, VQVAE):
        followers.append(LivingDecoder(folder, best, training.picture.images))
    if leads:
        followers.append(training.picture)
    if leads and importlib.util.find_spec("tensorboard"):
        followers.append(keras.callbacks.TensorBoard(folder / "tensorboard", write_graph=False))
    if getattr(config, "weight_average", 0):  # after those that want the averages, which are validated
        followers.append(keras.callbacks.SwapEMAWeights())
    followers.append(TrainingLog(own_folder, manager, epoch, training.num_items, silent=not leads))
    if not best.is_over:
        scored, steps = size, {}
        if strategy.num_replicas_in_sync > 1:
            scored = even_batch_size(training.num_validation, size, strategy.num_replicas_in_sync)
            steps["steps_per_epoch"] = training.num_items // size
            steps["validation_steps"] = training.num_validation // scored
        model.fit(
            spread(lambda size, part: training.stream(first_epoch, size, part), size, strategy),
            validation_data=spread(training.validation, scored, strategy),
            **steps,
            initial_epoch=first_epoch,
            epochs=config.epochs,
            callbacks=followers,
            shuffle=False,  # the stream does it
            verbose=0,
        )
    if not leads:
        return
    best.restore(model)
    training.picture.draw(model)
    finished = type(model).from_config(model.get_config())  # without the optimizer: a third of the size
    finished.set_weights(model.get_weights())
    finished.save(folder / "model.keras")
    compress(folder / "model.keras")
    history = read_history(folder)
    summary = _summary(folder.stem, history, training.num_items, model.score)
    print(summary)
    _log(folder, summary)
    best_epoch = len(history["epoch"]) - 1 - (int(best.age) if np.isfinite(best.score) else 0)
    write_json(
        folder / "metrics.json",
        {name: float(values[best_epoch]) for name, values in history.items() if name.startswith("val_")}
        | {
            "num_parameters": float(finished.count_params()),
            "training_seconds": float(history["seconds"].sum()),
        },
    )


def _restored(checkpoint: tf.train.Checkpoint, folder: Path) -> bool:
    """Restore the last checkpoint of a training that can be read, and return whether there is one.

    Raises:
        ValueError: if there are checkpoints, and not one can be read.
    """
    checkpoints = _checkpoints(folder)
    for number in sorted(checkpoints, reverse=True):
        try:
            checkpoint.restore(checkpoints[number]).assert_consumed()
        except AssertionError:
            (folder / RESTARTED).unlink(missing_ok=True)
            raise ValueError(
                f"{folder} was begun by another version, which kept other things: restart=True (--restart) begins anew."
            ) from None
        except Exception as error:  # TensorFlow raises many kinds for a broken file
            print(f"note: the checkpoint {checkpoints[number]} cannot be read ({' '.join(str(error).split())[:100]})")
        else:
            return True
    if checkpoints:
        (folder / RESTARTED).unlink(missing_ok=True)
        raise ValueError(f"No checkpoint in {folder} can be read: restart=True (--restart) begins anew.")
    return False


def _checkpoints(folder: Path) -> dict[int, str]:
    """Return the checkpoints of a training by the number of epochs that were done."""
    files = (file.with_suffix("") for file in (folder / "checkpoints").glob("ckpt-*.index"))
    return {int(file.name.removeprefix("ckpt-")): str(file) for file in files}


def _summary(name: str, history: dict[str, np.ndarray], num_items: int, score: str) -> str:
    """Return a line that says what a finished training took and came to."""
    seconds, values = history["seconds"].sum(), history[f"val_{score}"]
    text = f"{name}: {len(values)} epochs in {seconds / 60:.1f} min ({len(values) * num_items / seconds:,.0f} images/s)"
    if np.isfinite(values).any():
        text += f", best {score} in validation {np.nanmin(values):.4g} after epoch {np.nanargmin(values) + 1}"
    return f"{text}, peak memory {_peak_memory() / 1e9:.1f} GB"


def _peak_memory() -> float:
    """Return the most bytes of memory that this process has used: of the first GPU, or else of the machine."""
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if importlib.util.find_spec("resource") is None:  # Windows
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
