"""Training: `fit_or_load`, the one door to long work, and how it resumes.

A model folder is built beside its place, in `<name>.partial`, and renamed when it is complete: what has the name is
whole.
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.callbacks import BestWeights, ReconstructionGrid, SampleGrid, TrainingLog
from oasis_vq.codes import Codes, encode_slices, encode_views
from oasis_vq.config import PriorConfig, VQVAEConfig, write_json
from oasis_vq.folders import in_use, load_model, model_folder, new_record, read_history, refuse_other
from oasis_vq.guard import checked
from oasis_vq.pixelcnn import BitsPerCode, PixelCNN
from oasis_vq.slices import SliceIndex, Slices
from oasis_vq.streams import epoch_orders, load_images, make_dataset
from oasis_vq.vqvae import VQVAE

NUM_SHOWN = 8
"""Slices of validate in reconstructions.png."""


def fit_or_load(
    name: str | Path,
    config: VQVAEConfig | PriorConfig,
    index: SliceIndex,
    *,
    vqvae: VQVAE | None = None,
    restart: bool = False,
    cache: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> VQVAE | PixelCNN:
    """Load the model of this name if it has been trained with this configuration, else train it.

    A training that was interrupted goes on after its last finished epoch. The model is that of the epoch with the best
    validation score.

    Args:
        name: of a folder in `Paths.models`, or a path.
        config: what to train; a prior's slice positions and labels are set to those of the data.
        index: the slices; train is trained on, validate is scored after every epoch, test is left alone.
        vqvae: for a prior, the VQ-VAE whose codes it learns; one that `fit_or_load` or `load_vqvae` has returned.
        restart: whether to train anew; what has been trained under this name is kept until the new model is complete.
        cache: whether a VQ-VAE reads its slices from a file of decoded ones (`cached_images`).
        callbacks: of Keras, beside what is always there: history.csv and checkpoints; reconstructions.png, slices of
            validate over their reconstructions, or a prior's samples.png; TensorBoard's logs if it is installed.

    Raises:
        ValueError: if a model of this name has another configuration, data or VQ-VAE; both values are named. If the
            data guard finds an error.
    """
    if isinstance(config, PriorConfig):
        config = config.conditioned_by(index)
    folder = model_folder(name)
    partial = folder.with_name(f"{folder.name}.partial")
    record = new_record(config, index, folder, vqvae)
    for place in (folder, partial):
        if in_use(place):
            refuse_other(place, record, restart=restart)
    if in_use(folder) and not restart:
        return load_model(folder, record["model"])

    for note in checked(index):
        print(f"note: {note}")
    keras.utils.set_random_seed(config.seed)
    if vqvae is None:
        training = _train_vqvae(config, index, partial, cache=cache)
    else:
        training = _train_prior(config, index, partial, vqvae=vqvae)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "config.json", record)
    _fit(training, partial, callbacks)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return load_model(folder, record["model"])


@dataclass(frozen=True)
class _Training:
    """A compiled model and its streams; `stream(epoch)` begins with the order of that epoch."""

    model: VQVAE | PixelCNN
    stream: Callable[[int], tf.data.Dataset]
    validation: tf.data.Dataset
    num_items: int
    picture: keras.callbacks.Callback
    patience: int = 0


def _train_vqvae(config: VQVAEConfig, index: SliceIndex, folder: Path, *, cache: bool) -> _Training:
    def images(part: Slices, **options) -> tf.data.Dataset:
        reading = {"image_size": config.image_size, "fit": config.fit, "cache": cache}
        return make_dataset(part, **reading, batch_size=config.batch_size, **options)

    num_items = len(index.train) * (2 if config.upside_down_copies else 1)
    vqvae = VQVAE(config)
    vqvae.adapt(images(index.train))
    vqvae.compile(optimizer=build_optimizer(config, num_items))
    order = {"shuffle": True, "seed": config.seed, "augmentation": config}
    spread = np.linspace(0, len(index.validate) - 1, min(len(index.validate), NUM_SHOWN)).astype(int)
    shown = load_images(index.validate[spread], image_size=config.image_size, fit=config.fit)
    return _Training(
        vqvae,
        lambda epoch: images(index.train, first_epoch=epoch, **order),
        images(index.validate),
        num_items,
        picture=ReconstructionGrid(shown, folder / "reconstructions.png"),
    )


def _train_prior(config: PriorConfig, index: SliceIndex, folder: Path, *, vqvae: VQVAE) -> _Training:
    prior = PixelCNN(config)
    if not prior.sees_all:
        print(f"note: {prior.sight}")

    def grids(codes: Codes, rows: tf.data.Dataset) -> tf.data.Dataset:
        inputs = {name: tf.constant(getattr(codes, name)) for name in ("codes", *prior.condition_sizes)}

        def batch(rows: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            chosen = {name: tf.gather(values, rows) for name, values in inputs.items()}
            return chosen, chosen["codes"]

        return rows.batch(config.batch_size).map(batch).prefetch(tf.data.AUTOTUNE)

    def in_a_view(row: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return tf.cast(draws[0] * config.num_views, tf.int64) * len(index.train) + row

    def rows(epoch: int) -> tf.data.Dataset:
        return epoch_orders(len(index.train), seed=config.seed, first_epoch=epoch, num_draws=1).map(in_a_view)

    train = encode_views(vqvae, index.train, config.augmentation, config.num_views)
    validate = encode_slices(vqvae, index.validate)
    prior.compile(
        optimizer=build_optimizer(config, len(index.train)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[BitsPerCode(), "accuracy"],
    )
    return _Training(
        prior,
        lambda epoch: grids(train, rows(epoch)),
        grids(validate, tf.data.Dataset.range(len(validate))),
        len(index.train),
        picture=SampleGrid(vqvae, folder / "samples.png"),
        patience=config.patience,
    )


def build_optimizer(config: VQVAEConfig | PriorConfig, num_items: int) -> keras.optimizers.Optimizer:
    """Return Adam with the learning rate that the configuration asks for, for a training on so many items."""
    num_steps = -(-num_items // config.batch_size) * config.epochs
    rate = config.learning_rate
    if config.cosine_decay:
        warmup = min(config.warmup_steps, num_steps // 4)
        rising = {"initial_learning_rate": 0.0, "warmup_target": rate, "warmup_steps": warmup}
        start = rising if warmup else {"initial_learning_rate": rate}
        rate = keras.optimizers.schedules.CosineDecay(decay_steps=num_steps - warmup, **start)
    if isinstance(config, VQVAEConfig):
        return keras.optimizers.Adam(rate)
    # An average over at most a tenth of the steps: it begins at the first weights, which must not last.
    momentum = min(config.weight_average, max(0.0, 1 - 10 / num_steps))
    average = {"use_ema": True, "ema_momentum": momentum} if config.weight_average else {}
    return keras.optimizers.Adam(rate, global_clipnorm=config.clip_norm or None, **average)


def _fit(training: _Training, folder: Path, callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Train in a folder, from its last checkpoint on if there is one, and leave the finished model there."""
    model, config = training.model, training.model.config
    model.optimizer.build(model.trainable_variables)
    epoch = tf.Variable(0, dtype=tf.int64)
    # By list, not by object: the states of random generators, such as dropout's, are variables that objects leave out.
    state = [variable.value for variable in (*model.variables, *model.optimizer.variables)]
    best = BestWeights(model, training.patience)
    checkpoint = tf.train.Checkpoint(state=state, epoch=epoch, best=best.variables)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / "checkpoints"), max_to_keep=2)
    if manager.latest_checkpoint:
        try:
            checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        except AssertionError:
            raise ValueError(
                f"{folder} was begun by another version, which kept other things: restart=True (--restart) begins anew."
            ) from None
        print(f"{folder.stem}: going on after epoch {int(epoch)} of {config.epochs}")
    first_epoch = int(epoch)
    followers = [*callbacks, best, training.picture]
    if importlib.util.find_spec("tensorboard"):
        followers.append(keras.callbacks.TensorBoard(folder / "tensorboard", write_graph=False))
    if getattr(config, "weight_average", 0):  # after those that want the averages, which are validated
        followers.append(keras.callbacks.SwapEMAWeights())
    followers.append(TrainingLog(folder, manager, epoch, training.num_items))
    if not best.is_over:
        model.fit(
            training.stream(first_epoch),
            validation_data=training.validation,
            initial_epoch=first_epoch,
            epochs=config.epochs,
            callbacks=followers,
            shuffle=False,  # the stream does it
            verbose=0,
        )
    best.restore(model)
    training.picture.draw(model)
    finished = type(model).from_config(model.get_config())  # without the optimizer: a third of the size
    finished.set_weights(model.get_weights())
    finished.save(folder / "model.keras")
    history = read_history(folder)
    best_epoch = len(history["epoch"]) - 1 - (int(best.age) if np.isfinite(best.score) else 0)
    write_json(
        folder / "metrics.json",
        {name: float(values[best_epoch]) for name, values in history.items() if name.startswith("val_")}
        | {
            "num_parameters": float(finished.count_params()),
            "training_seconds": float(history["seconds"].sum()),
        },
    )
