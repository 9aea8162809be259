"""Training on all GPUs of a machine, or by processes on several machines, which share a folder.

Each process of a multi-worker training runs the same call. The first, the chief, alone writes the model folder; all
read it. Source: TensorFlow's guides to distributed training.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Literal

import tensorflow as tf


def make_strategy(
    name: Literal["mirrored", "multiworker"], *, workers: Sequence[str] = (), index: int | None = None
) -> tf.distribute.Strategy:
    """Return the strategy that spreads each batch of a training; make it before anything else of TensorFlow is used.

    Args:
        name: 'mirrored' for all GPUs of this machine, 'multiworker' for processes on one machine or several.
        workers: host:port of every process of a multi-worker training, the chief first; if there are none, the
            environment variable TF_CONFIG says.
        index: which of the workers this process is, from 0.

    Raises:
        ValueError: if it is not known who the workers are, or which of them this is.
    """
    if (name == "mirrored" and (workers or index is not None)) or (index is not None and not workers):
        raise ValueError("workers and index (--workers, --index) are given together, to the strategy multiworker.")
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if workers:
        if index is None or not 0 <= index < len(workers):
            raise ValueError(f"index is from 0 to {len(workers) - 1}, one for each worker. Received: {index}.")
        task = {"type": "worker", "index": index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": list(workers)}, "task": task})
    if not os.environ.get("TF_CONFIG"):
        raise ValueError("Who the workers are is said by workers and index (--workers, --index), or by TF_CONFIG.")
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this process writes what a training keeps."""
    if not _has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    return resolver.task_type == "chief" or ("chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0)


def wait_for_all(strategy: tf.distribute.Strategy, epoch: int = 0) -> None:
    """Return when every worker has come to this call.

    Raises:
        ValueError: if they are not at the same epoch.
    """
    if not _has_workers(strategy):
        return

    @tf.function
    def mean(value: tf.Tensor) -> tf.Tensor:
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, strategy.run(tf.identity, [value]), axis=None)

    first, second = mean(tf.constant([epoch, epoch**2], tf.float64)).numpy()
    if abs(second - first**2) > 1e-6:
        raise ValueError(
            f"The workers have read different checkpoints (this one that of epoch {epoch}): do all of them see the "
            "same folder? Give the commands again when they do."
        )


def shares_of_mean(gradients: Sequence[tf.Tensor | tf.IndexedSlices]) -> list[tf.Tensor]:
    """Return what each device gives to an optimizer that sums over devices: its equal share of their mean gradient.

    There is one for each weight, of its shape. All are dense: Adam in Keras squares each slice of a sparse one by
    itself. And a limit of the norm of a share is one of the whole gradient's: the optimizers of Keras limit before they
    sum.
    """
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    replicas = tf.distribute.get_replica_context()
    number = replicas.num_replicas_in_sync
    if number == 1:
        return gradients
    return [mean / number for mean in replicas.all_reduce(tf.distribute.ReduceOp.MEAN, gradients)]


def reported(values: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return what a training step reports, in the shape that Keras can average over workers: it takes axis 0."""
    several = _has_workers(tf.distribute.get_strategy())
    return {name: value[None] for name, value in values.items()} if several else values


def spread(
    make: Callable[[int, tuple[int, int] | None], tf.data.Dataset],
    batch_size: int,
    strategy: tf.distribute.Strategy,
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Return a stream of batches of which every device takes its part, as if one had taken them whole.

    On several devices it begins again at its end: at an end, counts that need no data are made once too often.

    Args:
        make: given a batch size returns the stream, or with (number, count) that of a part of each batch.
        batch_size: of all devices together; a multiple of their number.
        strategy: knows the devices. If there is only one, the stream is returned as it is made.
    """
    if strategy.num_replicas_in_sync == 1:
        return make(batch_size, None)

    def own(context: tf.distribute.InputContext) -> tf.data.Dataset:
        dataset = make(batch_size, (context.input_pipeline_id, context.num_input_pipelines))
        dataset = dataset.rebatch(batch_size // strategy.num_replicas_in_sync, drop_remainder=True).repeat()
        return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    return strategy.distribute_datasets_from_function(own)


def even_batch_size(num_items: int, batch_size: int, num_devices: int) -> int:
    """Return the largest batch size, up to this one, that shares items evenly: less than one a device is left over."""
    each = num_items // num_devices
    return num_devices * max(size for size in range(1, batch_size // num_devices + 1) if each % size == 0)


def _has_workers(strategy: tf.distribute.Strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
