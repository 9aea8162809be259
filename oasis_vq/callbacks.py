"""What happens during a training beside the training: its log, and a picture of how far it is."""

import csv
import io
import math
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.files import write_whole
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.sampling import sample_codes
from oasis_vq.vqvae import VQVAE

BEGIN_ANEW = "Begin anew (restart=True, --restart) with a lower learning rate, longer warm-up or another seed."


class TrainingLog(keras.callbacks.Callback):
    """Shows a progress bar and, after each epoch, adds a line to history.csv and saves a checkpoint.

    Args:
        folder: of the training; the bar has its name.
        manager: saves the checkpoints.
        epoch: finished epochs, (); part of the checkpoint.
        num_items: items an epoch.
        silent: whether there is no bar.
    """

    def __init__(
        self,
        folder: Path,
        manager: tf.train.CheckpointManager,
        epoch: tf.Variable,
        num_items: int,
        *,
        silent: bool = False,
    ):
        super().__init__()
        self.silent = silent
        self.file = folder / "history.csv"
        self.name = folder.stem
        self.manager = manager
        self.epoch = epoch
        self.num_items = num_items

    def on_train_begin(self, logs=None) -> None:
        total, done = self.params["epochs"] * self.num_items, int(self.epoch) * self.num_items
        shown = {"unit": "image", "smoothing": 0.05, "mininterval": 0.5, "disable": self.silent}
        self.progress = tqdm(desc=self.name, total=total, initial=done, **shown)
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
        # The first rows may be of an earlier version, which knew fewer columns.
        writer = csv.DictWriter(text, fieldnames=list(self.rows[-1]), restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.file, text.getvalue().encode())
        self.epoch.assign(epoch + 1)
        try:
            self.manager.save(checkpoint_number=epoch + 1)
        except tf.errors.OpError as error:
            reason = " ".join(error.message.split())[:200]
            raise OSError(
                f"{self.file.parent}: no checkpoint could be written after epoch {epoch + 1} ({reason}). Is the disk "
                "full? What was kept before is whole: the same call goes on from there."
            ) from None
        shown = self.model.score
        self.progress.set_postfix({"epoch": epoch + 1, shown: values[shown], "val": values[f"val_{shown}"]})

    def on_train_end(self, logs=None) -> None:
        self.progress.close()


class FiniteLoss(keras.callbacks.Callback):
    """Stops a training whose loss is no longer a number, before anything of it is kept.

    Args:
        folder: of the training, for the message.

    Raises:
        FloatingPointError: with step, learning rate and where the last good state is.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        self._check(logs, f"in step {batch + 1}")

    def on_test_end(self, logs=None) -> None:
        self._check(logs, "in validation")

    def _check(self, logs: dict, place: str) -> None:
        faulty = [name for name, value in logs.items() if not np.isfinite(value)]
        if faulty:
            rate = float(self.model.optimizer.learning_rate)
            kept = f"The checkpoint after epoch {self.epoch} stays" if self.epoch else "No epoch is done"
            raise FloatingPointError(
                f"{self.folder.stem}: {faulty[0]} is {float(logs[faulty[0]])} {place} of epoch {self.epoch + 1}, at a "
                f"learning rate of {rate:.3g}. {kept}; the same call would come to the same. {BEGIN_ANEW}"
            )


class BestWeights(keras.callbacks.Callback):
    """Keeps the weights that did best in validation, and ends a training that no longer gets better.

    Args:
        model: whose `score` is the name of the number that is to fall, of those `test_step` returns.
        patience: epochs without a better validation after which the training ends; 0 for never.

    What it knows is in `variables`: they belong into the checkpoint.
    """

    def __init__(self, model: keras.Model, patience: int = 0):
        super().__init__()
        self.patience = patience
        self.score = tf.Variable(np.inf, trainable=False, dtype=tf.float32)
        self.age = tf.Variable(0, trainable=False, dtype=tf.int64)  # validations since then
        self.weights = [tf.Variable(weight, trainable=False) for weight in model.get_weights()]

    @property
    def variables(self) -> list[tf.Variable]:
        """All that a training needs to go on."""
        return [self.score, self.age, *self.weights]

    @property
    def is_over(self) -> bool:
        """Whether patience is at an end."""
        return 0 < self.patience <= int(self.age)

    def on_test_end(self, logs=None) -> None:
        score = float(logs[self.model.score])
        self.age.assign_add(1)
        if score < float(self.score):
            self.score.assign(score)
            self.age.assign(0)
            for kept, weight in zip(self.weights, self.model.get_weights(), strict=True):
                kept.assign(weight)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        self.model.stop_training |= self.is_over

    def restore(self, model: keras.Model) -> None:
        """Give a model the weights that did best; it keeps its own if no validation gave a number."""
        if np.isfinite(self.score):
            model.set_weights([kept.numpy() for kept in self.weights])


class LivingDecoder(keras.callbacks.Callback):
    """Stops a training whose decoder, having learned, draws one image for all slices: its units are at zero for good.

    Args:
        folder: of the training, for the message.
        best: what did best in validation so far, updated before.
        images: (n, size, size, 1), float32 in [0, 1], of different slices.

    Raises:
        FloatingPointError: with what to change, and where the last good state is.
    """

    MUCH = 1.25
    """A score that many times the best is that of another state, not of another day."""

    def __init__(self, folder: Path, best: BestWeights, images: np.ndarray):
        super().__init__()
        self.folder, self.best, self.images = folder, best, images
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self.epoch = epoch

    def on_test_end(self, logs=None) -> None:
        score, best = float(logs[self.model.score]), float(self.best.score)
        differ = len(self.images) > 1  # of one image nothing can be said
        if differ and score > self.MUCH * best and np.ptp(self.model.reconstruct(self.images), axis=0).max() < 1e-3:
            raise FloatingPointError(
                f"{self.folder.stem}: the decoder draws the same for every slice in epoch {self.epoch + 1} "
                f"({self.model.score} {score:.3g}, {best:.3g} before), and does not learn again from there. The "
                f"checkpoint after epoch {self.epoch} stays; the same call would come to the same. {BEGIN_ANEW}"
            )


class _Picture(keras.callbacks.Callback):
    """Draws a picture during the training: into a PNG file, and in a notebook under the cell.

    Args:
        file: the PNG; each drawing replaces it. None for none.
    """

    def __init__(self, file: str | Path | None = None):
        super().__init__()
        self.file = None if file is None else Path(file)
        self.shown = None

    def _draw(self, rows: list[np.ndarray]) -> None:
        """Show rows of images, each (n, size, size, 1 or 3) in [0, 1]."""
        channels = max(images.shape[-1] for images in rows)
        rows = [np.concatenate(list(np.broadcast_to(part, (*part.shape[:-1], channels))), axis=1) for part in rows]
        grid = np.round(np.concatenate(rows) * 255).astype(np.uint8)  # (rows * size, n * size, channels)
        png = iio.imwrite("<bytes>", grid[..., 0] if channels == 1 else grid, extension=".png")
        if self.file is not None:
            write_whole(self.file, png)
        if "IPython" in sys.modules:
            self._show(png)

    def _show(self, png: bytes) -> None:
        from IPython import get_ipython
        from IPython.display import Image, display

        if not hasattr(get_ipython(), "kernel"):  # a script, or a shell without pictures
            return
        if self.shown is None:
            self.shown = display(Image(png), display_id=True)
        else:
            self.shown.update(Image(png))


class ReconstructionGrid(_Picture):
    """Draws images over their reconstructions after each epoch: into a PNG file, and in a notebook under the cell.

    Args:
        images: (n, size, size, 1), float32 in [0, 1].
        file: the PNG; each epoch replaces it. None for none.
    """

    def __init__(self, images: np.ndarray, file: str | Path | None = None):
        super().__init__(file)
        self.images = images

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        self.draw(self.model)

    def draw(self, model: VQVAE) -> None:
        """Draw now."""
        self._draw([self.images, model.reconstruct(self.images)])


class SampleGrid(_Picture):
    """Draws samples of a prior, codes over brains, after each validation: with the weights that were validated.

    The samples of every epoch have the same seed. Those after epochs 1, 2, 4, 8 and so on stay, beside the latest.

    Args:
        vqvae: decodes the samples.
        file: the PNG; each epoch replaces it. None for none.
        num: samples, two above 64x64 codes, where they take many seconds, and these after epochs 1, 2, 4, 8 and so on
            alone; where the prior is conditioned on slice position, they are spread over the positions.
    """

    def __init__(self, vqvae: VQVAE, file: str | Path | None = None, *, num: int = 8):
        super().__init__(file)
        self.vqvae = vqvae
        self.num = num
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self.epoch = epoch + 1

    def on_test_end(self, logs=None) -> None:
        stays = self.epoch.bit_count() == 1  # a power of two
        if stays or not self._is_wide(self.model):
            self.draw(self.model)
        if stays and self.file is not None:
            write_whole(self.file.with_stem(f"{self.file.stem}_epoch_{self.epoch:03d}"), self.file.read_bytes())

    @staticmethod
    def _is_wide(model: PixelCNN) -> bool:
        return math.prod(model.config.grid_shape) > 64**2

    def draw(self, model: PixelCNN) -> None:
        """Draw now."""
        config = model.config
        num, positions = min(self.num, 2) if self._is_wide(model) else self.num, None
        if config.num_slices:
            known = model.known_values["slice_index"]
            spread = np.linspace(0, len(known) - 1, num + 2)[1:-1]  # the ends show little brain
            positions = known[spread.round().astype(int)]
        codes = sample_codes(model, num, seed=0, slice_index=positions)
        brains = self.vqvae.decode(codes)
        colours = np.random.default_rng(0).uniform(0.2, 1.0, (config.num_embeddings, 3))
        scale = brains.shape[1] // codes.shape[1]
        self._draw([colours[codes].repeat(scale, axis=1).repeat(scale, axis=2), brains])
