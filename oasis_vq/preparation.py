"""What a training begins with: the compiled model, the slices or codes that it learns from, and its optimizer."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.callbacks import ReconstructionGrid, SampleGrid
from oasis_vq.codes import Codes, encode_slices, encode_views, joined
from oasis_vq.config import PriorConfig, VQVAEConfig
from oasis_vq.devices import is_chief
from oasis_vq.folders import make_drafter, sha256
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.slices import SliceIndex, Slices
from oasis_vq.streams import epoch_orders, load_images, make_dataset, part_of_batches
from oasis_vq.vqvae import VQVAE

CODES = "codes-*.npz"
"""What a prior learns, in its folder while it is trained."""
NUM_SHOWN = 8
"""Slices of validate in reconstructions.png."""
SSIM_CLIP_NORM = 10.0
"""Largest norm of a VQ-VAE's gradient with the SSIM in its loss, twice the usual one on IXI slices. The SSIM is steep
where an image is even: longer steps in a row, as the learning rate came to its highest, left two decoders black."""


@dataclass(frozen=True)
class Training:
    """A compiled model and what it is trained on.

    `stream(epoch, batch_size, part)` begins with the order of that epoch; `part` as in `make_dataset`.
    """

    model: VQVAE | PixelCNN
    stream: Callable[[int, int, tuple[int, int] | None], tf.data.Dataset]
    validation: Callable[[int, tuple[int, int] | None], tf.data.Dataset]
    num_items: int
    num_validation: int
    picture: keras.callbacks.Callback
    patience: int = 0


def prepare_vqvae(
    config: VQVAEConfig, index: SliceIndex, folder: Path, *, cache: bool, strategy: tf.distribute.Strategy
) -> Training:
    """Return a VQ-VAE adapted to the training slices, and the slices; the folder is for its picture."""

    def images(slices: Slices, batch_size: int, **options) -> tf.data.Dataset:
        reading = {"image_size": config.image_size, "fit": config.fit, "cache": cache}
        return make_dataset(slices, **reading, batch_size=batch_size, **options)

    num_items = len(index.train) * (2 if config.upside_down_copies else 1)
    with strategy.scope():
        vqvae = VQVAE(config)
        compile_for_training(vqvae, num_items)
    vqvae.adapt(images(index.train, config.batch_size))
    order = {"shuffle": True, "seed": config.seed, "augmentation": config}
    # By position: in the order of the files every n-th slice can be a top one.
    rows = np.linspace(0, len(index.validate) - 1, min(len(index.validate), NUM_SHOWN)).astype(int)
    rows = np.argsort(index.validate.slice, kind="stable")[rows]
    shown = load_images(index.validate[rows], image_size=config.image_size, fit=config.fit)
    return Training(
        vqvae,
        lambda epoch, batch_size, part: images(index.train, batch_size, first_epoch=epoch, part=part, **order),
        lambda batch_size, part: images(index.validate, batch_size, part=part),
        num_items,
        len(index.validate),
        picture=ReconstructionGrid(shown, folder / "reconstructions.png"),
    )


def prepare_prior(
    config: PriorConfig,
    index: SliceIndex,
    folder: Path,
    *,
    vqvae: VQVAE,
    coarse: PixelCNN | None,
    strategy: tf.distribute.Strategy,
) -> Training:
    """Return a prior, and the codes of all views of the slices; the folder is for them and for its picture."""
    with strategy.scope():
        prior = PixelCNN(config)
        compile_for_training(prior, len(index.train))
    if coarse is not None:
        prior.drafter = make_drafter(coarse, vqvae)
    if not prior.sees_all:
        print(f"note: {prior.sight}")

    given = ("codes", "draft", *prior.condition_sizes)

    def grids(codes: Codes, rows: tf.data.Dataset, size: int, part: tuple[int, int] | None) -> tf.data.Dataset:
        with tf.device("CPU:0"):
            inputs = {name: tf.constant(getattr(codes, name)) for name in given if name in codes.arrays()}

        def batch(rows: tf.Tensor) -> dict[str, tf.Tensor]:
            return {name: tf.cast(tf.gather(values, rows), tf.int32) for name, values in inputs.items()}

        batches = rows.batch(size) if part is None else part_of_batches(rows, size, part)
        return batches.map(batch).prefetch(tf.data.AUTOTUNE)

    def in_a_view(row: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return tf.cast(draws[0] * config.num_views, tf.int64) * len(index.train) + row

    def rows(epoch: int, size: int, part: tuple[int, int] | None) -> tf.data.Dataset:
        options = {"num_draws": 1, "endless": size if part else 0}
        return epoch_orders(len(index.train), seed=config.seed, first_epoch=epoch, **options).map(in_a_view)

    codes = _codes_to_learn(prior, vqvae, index, folder, keep=is_chief(strategy))
    num_grids = config.num_views * len(index.train)
    train, validate = codes[:num_grids], codes[num_grids:]
    return Training(
        prior,
        lambda epoch, size, part: grids(train, rows(epoch, size, part), size, part),
        lambda size, part: grids(validate, tf.data.Dataset.range(len(validate)), size, part),
        len(index.train),
        len(validate),
        picture=SampleGrid(vqvae, folder / "samples.png"),
        patience=config.patience,
    )


def _codes_to_learn(prior: PixelCNN, vqvae: VQVAE, index: SliceIndex, folder: Path, *, keep: bool) -> Codes:
    """Return the codes of all views of train, and after them those of validate; from a file in a folder if it is there.

    The file is there while the training is not complete: one that goes on encodes nothing again. Its name says what it
    was made from. The chief keeps it.
    """
    config, drafter = prior.config, prior.drafter
    models = [vqvae, drafter.coarse] if drafter else [vqvae]
    made_from = [sha256(model.folder / "model.keras") for model in models]
    made_from += [part.fingerprint(modified=True) for part in (index.train, index.validate)]
    made_from += [str(config.augmentation), str(config.num_views)]
    file = folder / CODES.replace("*", hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:12])
    if file.exists():
        try:
            return Codes.load(file)
        except MemoryError:
            raise
        except Exception as error:  # a broken archive has many kinds
            print(f"note: {file} cannot be read ({' '.join(str(error).split())[:100]}); the slices are encoded again")
    train = encode_views(vqvae, index.train, config.augmentation, config.num_views, drafter=drafter)
    codes = joined([train, encode_slices(vqvae, index.validate, split="validate", drafter=drafter, compact=True)])
    if keep:
        codes.save(file)
    return codes


def compile_for_training(model: VQVAE | PixelCNN, num_items: int) -> None:
    """Give a model its optimizer and its schedules, for a training on so many items; `build_optimizer` says which."""
    jit_compile = "auto" if model.config.jit_compile is None else model.config.jit_compile
    model.compile(optimizer=build_optimizer(model.config, num_items), jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)
    if isinstance(model, VQVAE):
        _, model.ssim_warmup = _steps(model.config, num_items)


def _steps(config: VQVAEConfig | PriorConfig, num_items: int) -> tuple[int, int]:
    """Return the steps of a training on so many items, and those of its warm-up: a quarter at most."""
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    num_steps = (num_items // config.batch_size if devices > 1 else -(-num_items // config.batch_size)) * config.epochs
    return num_steps, min(config.warmup_steps, num_steps // 4)


def build_optimizer(config: VQVAEConfig | PriorConfig, num_items: int) -> keras.optimizers.Optimizer:
    """Return Adam with the learning rate that the configuration asks for, for a training on so many items."""
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    num_steps, warmup = _steps(config, num_items)
    rate = config.learning_rate
    if config.cosine_decay:
        rising = {"initial_learning_rate": 0.0, "warmup_target": rate, "warmup_steps": warmup}
        start = rising if warmup else {"initial_learning_rate": rate}
        rate = keras.optimizers.schedules.CosineDecay(decay_steps=num_steps - warmup, **start)
    if isinstance(config, VQVAEConfig):
        average, clip_norm = {}, SSIM_CLIP_NORM if config.ssim_weight else 0.0
    else:
        # An average over at most a tenth of the steps: it begins at the first weights, which must not last.
        momentum = min(config.weight_average, max(0.0, 1 - 10 / num_steps))
        average = {"use_ema": True, "ema_momentum": momentum} if config.weight_average else {}
        clip_norm = config.clip_norm
    # Of several devices each gives its share of the gradient (shares_of_mean), and Keras limits that.
    return keras.optimizers.Adam(rate, global_clipnorm=clip_norm / devices or None, **average)
