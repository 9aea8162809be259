"""Training, resuming, saving and loading; everything here knows files.

A model folder holds `model.keras`, `config.json`, `metrics.json` and `history.csv`. It is built beside its place,
in `<name>.partial`, and renamed when it is complete: what has the name is whole.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.config import Config, Paths, PriorConfig, VQVAEConfig, write_json, write_whole
from oasis_vq.pixelcnn import BitsPerCode, PixelCNN
from oasis_vq.slices import SPLITS, SliceIndex, Slices, check_readable, epoch_orders, make_dataset
from oasis_vq.vqvae import VQVAE

_CONFIGS: dict[str, type[Config]] = {"VQVAE": VQVAEConfig, "PixelCNN": PriorConfig}


@dataclass(frozen=True)
class Codes:
    """The codes of slices, and whose they are, as parallel arrays of length n.

    Attributes:
        codes: (n, h, w) int32.
        slice_index: (n,) int32, slice position.
        label: (n,) int32, class, -1 where unknown.
        subject: (n,) str.
        split: (n,) str, train, validate or test.
    """

    codes: np.ndarray
    slice_index: np.ndarray
    label: np.ndarray
    subject: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows) -> "Codes":
        """Return the rows of a slice object, an index array or a boolean mask."""
        return Codes(**{name: values[rows] for name, values in vars(self).items()})

    def save(self, path: str | Path) -> None:
        """Write a codes.npz, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **vars(self))
        write_whole(Path(path), content.getvalue())

    @staticmethod
    def load(path: str | Path) -> "Codes":
        """Read a codes.npz."""
        with np.load(path, allow_pickle=False) as arrays:
            return Codes(**{"split": np.full(len(arrays["codes"]), ""), **arrays})


def encode_slices(vqvae: VQVAE, slices: Slices, *, split: str = "") -> Codes:
    """Return the codes of all slices; they are streamed from disk, and only the codes stay in memory."""
    dataset = make_dataset(slices, image_size=vqvae.config.image_size, batch_size=64)
    batches = tqdm(dataset.as_numpy_iterator(), "encoding", len(dataset), unit="batch", leave=False)
    parts = [vqvae.encode(images) for images in batches]
    names = np.full(len(slices), split, dtype="U8")
    return Codes(np.concatenate(parts), slices.slice, slices.label, slices.subject, names)


def encode_index(vqvae: VQVAE, index: SliceIndex, splits: tuple[str, ...] = SPLITS) -> Codes:
    """Return the codes of several splits in one table."""
    parts = [encode_slices(vqvae, index.splits()[split], split=split) for split in splits]
    return Codes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model: a text without a slash is one of `Paths.models`, anything else is the path."""
    return Paths().models / name if isinstance(name, str) and not {"/", os.sep} & set(name) else Path(name)


def fit_or_load(
    name: str | Path,
    config: VQVAEConfig | PriorConfig,
    index: SliceIndex,
    *,
    vqvae: VQVAE | None = None,
    restart: bool = False,
) -> VQVAE | PixelCNN:
    """Load the model of this name if it has been trained with this configuration, else train it.

    A training that was interrupted goes on after its last finished epoch.

    Args:
        name: of a folder in `Paths.models`, or a path.
        config: what to train.
        index: the slices; train is trained on, validate is scored after every epoch, test is left alone.
        vqvae: for a prior, the VQ-VAE whose codes it learns; one that `fit_or_load` or `load_vqvae` has returned.
        restart: whether to train anew; what has been trained under this name is kept until the new model is complete.

    Raises:
        ValueError: if a model of this name has another configuration, data or VQ-VAE; both values are named.
    """
    folder = model_folder(name)
    partial = folder.with_name(f"{folder.name}.partial")
    record = _record(config, index, folder, vqvae)
    for place in (folder, partial):
        if _in_use(place):
            _refuse_other(place, record, restart=restart)
    if _in_use(folder) and not restart:
        return _load(folder, record["model"])

    for part in (index.train, index.validate):
        check_readable(part)
    keras.utils.set_random_seed(config.seed)
    training = _train_vqvae(config, index) if vqvae is None else _train_prior(config, index, vqvae)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "config.json", record)
    _fit(training, partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return _load(folder, record["model"])


def _record(config: VQVAEConfig | PriorConfig, index: SliceIndex, folder: Path, vqvae: VQVAE | None) -> dict:
    """Return what config.json says of a model: its kind and configuration, the data, and a prior's VQ-VAE."""
    if isinstance(config, PriorConfig):
        if vqvae is None:
            raise ValueError("A prior needs the VQ-VAE whose codes it learns. Received: vqvae=None.")
        if config != config.matched_to(vqvae.config):
            difference = config.differences(config.matched_to(vqvae.config))
            raise ValueError(f"The prior does not fit the VQ-VAE ({difference}): use config.matched_to(vqvae.config).")
    elif vqvae is not None:
        raise ValueError("A VQ-VAE is trained on slices alone. Received: vqvae beside a VQVAEConfig.")
    data = {split: index.splits()[split].fingerprint() for split in ("train", "validate")}
    record = {
        "model": "VQVAE" if vqvae is None else "PixelCNN",
        "config": config.to_dict(),
        "data": {"name": index.root.name, "num_train": len(index.train), **data},
    }
    return record if vqvae is None else {**record, "vqvae": _reference(vqvae, folder)}


def _in_use(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def load_vqvae(folder: str | Path) -> VQVAE:
    """Load a VQ-VAE from its folder, or from its name in `Paths.models`.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if it holds something else.
    """
    return _load(model_folder(folder), "VQVAE")


def load_prior(folder: str | Path) -> PixelCNN:
    """Load a prior from its folder, or from its name in `Paths.models`, if its VQ-VAE is the one it was trained with.

    Raises:
        FileNotFoundError: if the folder, a file of it, or its VQ-VAE is missing.
        ValueError: if it holds something else, or the VQ-VAE has changed.
    """
    folder = model_folder(folder)
    prior = _load(folder, "PixelCNN")
    reference = read_record(folder)["vqvae"]
    file = vqvae_folder(folder) / "model.keras"
    if not file.exists():
        raise FileNotFoundError(
            f"No VQ-VAE in {file.parent}, whose codes the prior {folder} was trained on. "
            "Put it back, or train the prior again."
        )
    if _sha256(file) != reference["sha256"]:
        raise ValueError(
            f"{file} is not the VQ-VAE whose codes the prior {folder} was trained on: expected SHA-256 "
            f"{reference['sha256'][:12]}, found {_sha256(file)[:12]}. Put the old one back, or train the prior again."
        )
    return prior


def read_record(folder: str | Path) -> dict:
    """Return the contents of a model folder's config.json: what it is, its configuration, and a prior's VQ-VAE."""
    file = model_folder(folder) / "config.json"
    if not file.exists():
        trained = f"; a training has begun in {file.parent}.partial" if Path(f"{file.parent}.partial").exists() else ""
        raise FileNotFoundError(
            f"No config.json in {file.parent}. Expected a model folder, as train-vqvae or train-prior make{trained}."
        )
    try:
        record = json.loads(file.read_text())
        _CONFIGS[record["model"]].from_dict(record["config"])
        if record["model"] == "PixelCNN":
            Path(record["vqvae"]["folder"]), str(record["vqvae"]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the configuration of a model ({error}). Train the model again.") from error
    return record


def vqvae_folder(prior_folder: str | Path) -> Path:
    """Return the folder of the VQ-VAE that a prior belongs to."""
    prior_folder = model_folder(prior_folder)
    return Path(os.path.normpath(prior_folder / read_record(prior_folder)["vqvae"]["folder"]))


def read_history(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the columns of a model folder's history.csv by name, one value an epoch."""
    with (model_folder(folder) / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def _load(folder: Path, kind: str) -> VQVAE | PixelCNN:
    record = read_record(folder)
    if record["model"] != kind:
        raise ValueError(f"{folder} holds a {record['model']}. Expected a {kind}.")
    file = folder / "model.keras"
    if not file.exists():
        raise FileNotFoundError(f"No model.keras in {folder}. Expected the weights of the {kind}: train it again.")
    try:
        model = keras.models.load_model(file)
    except Exception as error:  # Keras raises many kinds for a broken file; the user needs to know which file.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be loaded ({reason}). Train the model again.") from error
    model.folder = folder
    return model


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _reference(vqvae: VQVAE, prior_folder: Path) -> dict[str, str]:
    """Return what a prior's config.json says of its VQ-VAE: the relative folder and the file's SHA-256."""
    folder = getattr(vqvae, "folder", None)
    if folder is None:
        raise ValueError("A prior needs a saved VQ-VAE: take the one that fit_or_load or load_vqvae returned.")
    relative = os.path.relpath(folder, prior_folder)
    return {"folder": Path(relative).as_posix(), "sha256": _sha256(folder / "model.keras")}


def _refuse_other(folder: Path, record: dict, *, restart: bool) -> None:
    """Raise ValueError if a folder holds no model, or, unless it is replaced, one made otherwise than asked for."""
    found = read_record(folder)
    if restart:
        return
    if found["model"] != record["model"]:
        text = f"model: {found['model']}, not {record['model']}"
    else:
        config = _CONFIGS[record["model"]]
        text = config.from_dict(found["config"]).differences(config.from_dict(record["config"]))
    for part in ("data", "vqvae"):
        before, now = found.get(part, {}), record.get(part, {})
        changed = [name for name in now if name not in ("name", "folder") and before.get(name) != now[name]]
        if changed and not text:
            text = f"{part} {changed[0]}: {str(before.get(changed[0]))[:12]}, not {str(now[changed[0]])[:12]}"
    if text:
        raise ValueError(
            f"{folder} was trained otherwise ({text}). Use another name, what it was trained with, "
            "or restart=True (--restart) to replace it."
        )


@dataclass(frozen=True)
class _Training:
    """A compiled model and its streams; `stream(epoch)` begins with the order of that epoch."""

    model: VQVAE | PixelCNN
    stream: Callable[[int], tf.data.Dataset]
    validation: tf.data.Dataset
    num_items: int


def _train_vqvae(config: VQVAEConfig, index: SliceIndex) -> _Training:
    def images(part: Slices, **options) -> tf.data.Dataset:
        return make_dataset(part, image_size=config.image_size, batch_size=config.batch_size, **options)

    vqvae = VQVAE(config)
    vqvae.adapt(images(index.train))
    vqvae.compile(optimizer=_adam(config, len(index.train)))
    return _Training(
        vqvae,
        lambda epoch: images(index.train, shuffle=True, seed=config.seed, first_epoch=epoch),
        images(index.validate),
        len(index.train),
    )


def _train_prior(config: PriorConfig, index: SliceIndex, vqvae: VQVAE) -> _Training:
    prior = PixelCNN(config)

    def grids(codes: Codes, rows: tf.data.Dataset) -> tf.data.Dataset:
        inputs = {name: tf.constant(getattr(codes, name)) for name in ("codes", *prior.condition_sizes)}

        def batch(rows: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            chosen = {name: tf.gather(values, rows) for name, values in inputs.items()}
            return chosen, chosen["codes"]

        return rows.batch(config.batch_size).map(batch).prefetch(tf.data.AUTOTUNE)

    for part in (index.train, index.validate):
        if config.num_slices and part.slice.max() >= config.num_slices:
            path = part.path[part.slice.argmax()]
            raise ValueError(
                f"{path} is beyond the {config.num_slices} slice positions: use num_slices (--num-slices)."
            )
    train, validate = (encode_slices(vqvae, part) for part in (index.train, index.validate))
    prior.compile(
        optimizer=_adam(config, len(train)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[BitsPerCode(), "accuracy"],
    )
    return _Training(
        prior,
        lambda epoch: grids(train, epoch_orders(len(train), seed=config.seed, first_epoch=epoch)),
        grids(validate, tf.data.Dataset.range(len(validate))),
        len(train),
    )


def _adam(config: VQVAEConfig | PriorConfig, num_items: int) -> keras.optimizers.Optimizer:
    num_steps = -(-num_items // config.batch_size) * config.epochs
    rate = config.learning_rate
    if config.cosine_decay:
        rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, num_steps)
    return keras.optimizers.Adam(rate)


def _fit(training: _Training, folder: Path) -> None:
    """Train in a folder, from its last checkpoint on if there is one, and leave the finished model there."""
    model, config = training.model, training.model.config
    model.optimizer.build(model.trainable_variables)
    epoch = tf.Variable(0, dtype=tf.int64)
    # By list, not by object: the states of random generators, such as dropout's, are variables that objects leave out.
    state = [variable.value for variable in (*model.variables, *model.optimizer.variables)]
    checkpoint = tf.train.Checkpoint(state=state, epoch=epoch)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / "checkpoints"), max_to_keep=2)
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        print(f"{folder.stem}: going on after epoch {int(epoch)} of {config.epochs}")
    first_epoch = int(epoch)
    log = _TrainingLog(folder, manager, epoch, training.num_items)
    model.fit(
        training.stream(first_epoch),
        validation_data=training.validation,
        initial_epoch=first_epoch,
        epochs=config.epochs,
        callbacks=[log],
        shuffle=False,  # the stream does it
        verbose=0,
    )
    finished = type(model).from_config(model.get_config())  # without the optimizer: a third of the size
    finished.set_weights(model.get_weights())
    finished.save(folder / "model.keras")
    history = read_history(folder)
    write_json(
        folder / "metrics.json",
        {name: float(values[-1]) for name, values in history.items() if name.startswith("val_")}
        | {
            "num_parameters": float(finished.count_params()),
            "training_seconds": float(history["seconds"].sum()),
        },
    )


class _TrainingLog(keras.callbacks.Callback):
    """Shows a progress bar and, after each epoch, adds a line to history.csv and saves a checkpoint."""

    def __init__(self, folder: Path, manager: tf.train.CheckpointManager, epoch: tf.Variable, num_items: int):
        super().__init__()
        self.file = folder / "history.csv"
        self.name = folder.stem
        self.manager = manager
        self.epoch = epoch
        self.num_items = num_items

    def on_train_begin(self, logs=None) -> None:
        total, done = self.params["epochs"] * self.num_items, int(self.epoch) * self.num_items
        self.progress = tqdm(desc=self.name, total=total, initial=done, unit="image", smoothing=0.05, mininterval=0.5)
        self.rows = []
        if self.file.exists():  # an epoch that was written, but not yet in a checkpoint, is repeated
            with self.file.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= int(self.epoch)]

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        size = self.model.config.batch_size
        self.progress.update(min(size, self.num_items - batch * size))

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        values = {name: float(value) for name, value in logs.items()}
        seconds = time.monotonic() - self.started
        self.rows.append({"epoch": epoch + 1, **values, "seconds": round(seconds, 3)})
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.file, text.getvalue().encode())
        self.epoch.assign(epoch + 1)
        self.manager.save(checkpoint_number=epoch + 1)
        shown = "total_loss" if "total_loss" in values else "bits_per_code"
        self.progress.set_postfix({"epoch": epoch + 1, shown: values[shown], "val": values[f"val_{shown}"]})

    def on_train_end(self, logs=None) -> None:
        self.progress.close()
