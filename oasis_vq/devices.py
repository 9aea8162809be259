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
    return not _has_workers(strategy) or strategy.cluster_resolver.task_id == 0


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Return when every worker has come to this call."""
    if _has_workers(strategy):

        @tf.function
        def meet() -> tf.Tensor:
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: tf.ones(())), axis=None)

        meet()


def reported(values: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return what a training step reports, in the shape that Keras can average over workers: it takes axis 0."""
    several = _has_workers(tf.distribute.get_strategy())
    return {name: value[None] for name, value in values.items()} if several else values


def spread(
    make: Callable[[tuple[int, int] | None], tf.data.Dataset], batch_size: int, strategy: tf.distribute.Strategy
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Return a stream of batches of which every device takes its part, as if one had taken them whole.

    Args:
        make: returns the stream, or with (number, count) that of a part of each batch.
        batch_size: of all devices together; a multiple of their number.
        strategy: knows the devices. If there is only one, the stream is returned as it is made.
    """
    if strategy.num_replicas_in_sync == 1:
        return make(None)

    def own(context: tf.distribute.InputContext) -> tf.data.Dataset:
        dataset = make((context.input_pipeline_id, context.num_input_pipelines))
        return dataset.rebatch(batch_size // strategy.num_replicas_in_sync, drop_remainder=True)

    return strategy.distribute_datasets_from_function(own)


def _has_workers(strategy: tf.distribute.Strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
