"""Train the 4x VQ-VAE with one thing about its quantizer changed, and compare on the validation slices.

    python benchmarks/options.py --data DATA

What pays is in the library; what does not is only here. A row that has been measured is not measured again; the rows
are in benchmarks/results/options.json, the table in options.md beside it.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

import oasis_vq as ovq
from oasis_vq.files import write_json, write_whole
from oasis_vq.preparation import compile_for_training
from oasis_vq.quantizer import nearest_codes
from oasis_vq.runtime import start_tensorflow
from oasis_vq.tables import markdown_table

RESULTS = Path(__file__).parent / "results"


class Rotated(ovq.EMAVectorQuantizer):
    """The gradient turns as the latent does on its way to its vector: Fifty et al. 2024, section 4.2."""

    def call(self, latents, training=False):
        vectors, codes, loss = super().call(latents, training)
        return self._rotated(latents, tf.stop_gradient(vectors)), codes, loss

    @staticmethod
    @tf.custom_gradient
    def _rotated(latents, vectors):
        def backward(upstream):
            latent_norms = tf.norm(latents, axis=-1, keepdims=True) + 1e-6
            vector_norms = tf.norm(vectors, axis=-1, keepdims=True) + 1e-6
            source, target = latents / latent_norms, vectors / vector_norms
            middle = tf.math.l2_normalize(source + target, axis=-1)

            def along(axis):
                return tf.reduce_sum(upstream * axis, axis=-1, keepdims=True)

            turned = upstream - 2 * middle * along(middle) + 2 * source * along(target)
            return vector_norms / latent_norms * turned, None

        return tf.identity(vectors), backward


class Normalised(ovq.EMAVectorQuantizer):
    """Latents and vectors of length 1, compared by their angle: Yu et al. 2022 (ViT-VQGAN), section 3.2."""

    def unit_codebook(self):
        return tf.math.l2_normalize(tf.convert_to_tensor(self.codebook), axis=-1)

    def codes(self, latents):
        return nearest_codes(tf.math.l2_normalize(tf.cast(latents, tf.float32), axis=-1), self.unit_codebook())

    def lookup(self, codes):
        return tf.gather(self.unit_codebook(), codes)

    def call(self, latents, training=False):
        return super().call(tf.math.l2_normalize(latents, axis=-1), training)


class FiniteScalarQuantizer(keras.layers.Layer):
    """Rounds each bounded channel to one of a few levels, no codebook: Mentzer et al. 2023, section 3."""

    LEVELS = (8, 8, 8)

    def bounded(self, latents):
        levels = tf.constant(self.LEVELS, tf.float32)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = tf.where(levels % 2 == 0, 0.5, 0.0)
        return tf.tanh(latents + tf.atanh(offset / half)) * half - offset

    def codes(self, latents):
        levels = tf.cast(tf.round(self.bounded(latents)), tf.int32) + tf.constant(self.LEVELS) // 2
        return tf.reduce_sum(levels * tf.constant([math.prod(self.LEVELS[:place]) for place in range(3)]), axis=-1)

    def lookup(self, codes):
        levels = [codes // math.prod(self.LEVELS[:place]) % count for place, count in enumerate(self.LEVELS)]
        half = tf.constant(self.LEVELS) // 2
        return tf.cast(tf.stack(levels, axis=-1) - half, tf.float32) / tf.cast(half, tf.float32)

    def call(self, latents, training=False):
        bounded = self.bounded(latents)
        rounded = bounded + tf.stop_gradient(tf.round(bounded) - bounded)
        return rounded / tf.cast(tf.constant(self.LEVELS) // 2, tf.float32), self.codes(latents), tf.constant(0.0)


def vqvae_with(quantizer: Callable[[ovq.VQVAEConfig], keras.layers.Layer]) -> type[ovq.VQVAE]:
    """Return a VQ-VAE class with another quantizer."""

    class Changed(ovq.VQVAE):
        def build_quantizer(self):
            return quantizer(self.config)

    return Changed


def ema(layer: type[ovq.EMAVectorQuantizer], **options) -> type[ovq.VQVAE]:
    """Return a VQ-VAE class with a kind of EMA quantizer."""
    return vqvae_with(
        lambda config: layer(
            config.num_embeddings,
            config.embedding_dim,
            commitment_cost=config.commitment_cost,
            seed=config.seed,
            **options,
        )
    )


OPTIONS: dict[str, tuple[type[ovq.VQVAE], dict]] = {
    "fine128 (EMA, straight through, 32 dimensions)": (ovq.VQVAE, {}),
    "the same, another seed": (ovq.VQVAE, {"seed": 1}),
    "rotation trick": (ema(Rotated), {}),
    "projection to 8 dimensions": (ovq.VQVAE, {"embedding_dim": 8}),
    "l2-normalised, 16 dimensions": (ema(Normalised), {"embedding_dim": 16}),
    "finite scalar quantization, 8 x 8 x 8": (vqvae_with(lambda config: FiniteScalarQuantizer()), {"embedding_dim": 3}),
    "codebook by gradient": (ovq.VQVAE, {"quantizer": "gradient"}),
    "without restarts": (ema(ovq.EMAVectorQuantizer, restart_interval=0), {}),
}


def main() -> None:
    """Measure what has not been measured, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with 128x128 slices")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    start_tensorflow()
    index = ovq.find_slices(arguments.data)
    file = RESULTS / "options.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, (kind, changes) in OPTIONS.items():
        config = dataclasses.replace(ovq.recipe("fine128").vqvae, epochs=arguments.epochs, **changes)
        if name in rows and rows[name]["config"] == config.to_dict():
            continue
        keras.utils.set_random_seed(config.seed)
        model = kind(config)
        images = {"image_size": config.image_size, "batch_size": config.batch_size}
        model.adapt(ovq.make_dataset(index.train, **images))
        compile_for_training(model, len(index.train))
        stream = ovq.make_dataset(index.train, **images, shuffle=True, seed=config.seed)
        model.fit(stream, epochs=config.epochs, shuffle=False, verbose=0)
        report = ovq.evaluate_reconstruction(model, index.validate, train=index.train)
        scores = {key: report[key] for key in ("brain_ssim", "brain_psnr", "ssim", "codebook_usage", "perplexity")}
        rows[name] = {"config": config.to_dict(), "num_images": len(index.train), **scores}
        write_json(file, rows)
        print(f"{name}: {scores}", flush=True)
    table = [
        {"quantizer": name}
        | {key: f"{row[key]:.3f}" for key in ("brain_ssim", "brain_psnr", "ssim")}
        | {"codes used": f"{row['codebook_usage']:.0%}", "perplexity": f"{row['perplexity']:.0f}"}
        for name, row in rows.items()
    ]
    text = markdown_table(table)
    print(text)
    write_whole(RESULTS / "options.md", text.encode())


if __name__ == "__main__":
    main()
