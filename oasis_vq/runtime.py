"""TensorFlow as this project starts it, and the precision that layers are built in."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator


def start_tensorflow(seed: int = 0, *, deterministic: bool = False) -> str:
    """Import TensorFlow without its noise, let GPU memory grow, seed everything; return the names of the devices.

    With `deterministic`, for the rest of the session, every operation of TensorFlow gives the same bits each time. That
    costs speed on GPUs.
    """
    # TensorFlow leaves oneDNN's convolutions off on CPUs without AVX-512; they are a quarter faster there too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with quiet_native_logs():
        import keras
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    # Several models in a session are traced once each, which TensorFlow takes for one that is traced again and again.
    tf.get_logger().addFilter(_is_no_retracing)
    # This pass fails on a convolution whose sum with a skip meets a ReLU, and says so each time; it gains nothing here.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    try:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        pass  # The GPUs are in use already, by an earlier call in this session: growth is on.
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return f"{', '.join(names) or f'CPU, {os.cpu_count()} cores'} (TensorFlow {tf.__version__})"


def _is_no_retracing(record: logging.LogRecord) -> bool:
    return "triggered tf.function retracing" not in record.getMessage()


@contextlib.contextmanager
def quiet_native_logs() -> Iterator[None]:
    """Send what native code writes to file descriptor 2 nowhere.

    TensorFlow writes before its log level holds, and as an error what is none: that bfloat16 is slow on this CPU.
    """
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") < "2":
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def in_precision(policy: str) -> Iterator[None]:
    """Build layers with a precision policy, and leave the session's own as it was."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def gradient_slowdown(policy: str) -> float:
    """Return how many times as long a convolution and its gradients take in a precision policy as in float32, here.

    TensorFlow has fast gradients in bfloat16 for CPUs with AVX-512 alone. Elsewhere they are over ten times slower.
    """
    import keras
    import tensorflow as tf

    def seconds(dtype: str) -> float:
        images, kernel = tf.ones((8, 32, 32, 64), dtype), tf.ones((3, 3, 64, 64), dtype)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                features = tf.nn.conv2d(images, kernel, 1, "SAME")
            for gradient in tape.gradient(features, [images, kernel]):
                gradient.numpy()
            times.append(time.perf_counter() - start)
        return min(times)

    with quiet_native_logs():
        return seconds(keras.DTypePolicy(policy).compute_dtype) / seconds("float32")
