"""What happens during a training beside the training: its log, and a picture of how far it is."""

import csv
import io
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.config import write_whole


class TrainingLog(keras.callbacks.Callback):
    """Shows a progress bar and, after each epoch, adds a line to history.csv and saves a checkpoint.

    Args:
        folder: of the training; the bar has its name.
        manager: saves the checkpoints.
        epoch: finished epochs, (); part of the checkpoint.
        num_items: items an epoch.
    """

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
        # The first rows may be of an earlier version, which knew fewer columns.
        writer = csv.DictWriter(text, fieldnames=list(self.rows[-1]), restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.file, text.getvalue().encode())
        self.epoch.assign(epoch + 1)
        self.manager.save(checkpoint_number=epoch + 1)
        shown = "total_loss" if "total_loss" in values else "bits_per_code"
        self.progress.set_postfix({"epoch": epoch + 1, shown: values[shown], "val": values[f"val_{shown}"]})

    def on_train_end(self, logs=None) -> None:
        self.progress.close()


class ReconstructionGrid(keras.callbacks.Callback):
    """Draws images over their reconstructions after each epoch: into a PNG file, and in a notebook under the cell.

    Args:
        images: (n, size, size, 1), float32 in [0, 1].
        file: the PNG; each epoch replaces it. None for none.
    """

    def __init__(self, images: np.ndarray, file: str | Path | None = None):
        super().__init__()
        self.images = images
        self.file = None if file is None else Path(file)
        self.shown = None

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        rows = (np.concatenate(list(part), axis=1) for part in (self.images, self.model.reconstruct(self.images)))
        grid = np.concatenate(list(rows))[..., 0]  # (2 size, n size)
        png = iio.imwrite("<bytes>", np.round(grid * 255).astype(np.uint8), extension=".png")
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
