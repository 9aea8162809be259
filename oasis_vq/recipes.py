"""Named pairs of configurations: one VQ-VAE and the prior over its codes.

Five are those of published coursework reports. What a report does not state is as in the keras.io examples: 4x
downsampling, 3x3 convolutions, codebook by gradient, squared error over the data's variance, Adam without a schedule;
but batches that fit into memory at 256x256. Validation is by people, also where a report splits slices. The two
convolutions of bce_search's encoder, and of its decoder, are read as one with ReLU and one without; then the sigmoid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from oasis_vq.config import PriorConfig, VQVAEConfig


@dataclass(frozen=True)
class Recipe:
    """A VQ-VAE and a prior that fit each other."""

    name: str
    description: str
    vqvae: VQVAEConfig
    prior: PriorConfig
    coarse: str = ""
    """The recipe whose samples the prior refines, if there are two levels."""
    reported: str = ""
    """What the report it follows claims, on data of its own."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of the VQ-VAE's fields that the report's search tries."""
    prior_grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Likewise of the prior's."""

    def quick(self) -> "Recipe":
        """Return the recipe with both configurations made small: minutes on a CPU."""
        vqvae = self.vqvae.quick()
        return replace(self, vqvae=vqvae, prior=self.prior.matched_to(vqvae).quick())


def recipe(name: str, *, profile: str = "full") -> Recipe:
    """Return the recipe with this name.

    Args:
        name: one of `recipe_names()`.
        profile: 'full', or 'quick' for the small version.

    Raises:
        ValueError: if there is no such recipe or profile.
    """
    if name not in _RECIPES:
        raise ValueError(f"A recipe is one of {', '.join(_RECIPES)}. Received: {name}.")
    if profile not in ("quick", "full"):
        raise ValueError(f"A profile is 'quick' or 'full'. Received: {profile}.")
    return _RECIPES[name].quick() if profile == "quick" else _RECIPES[name]


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return list(_RECIPES)


def _recipe(name: str, description: str, vqvae: VQVAEConfig, prior: PriorConfig, *, coarse: str = "", **more) -> Recipe:
    vqvae = replace(vqvae, recipe=name)
    prior = replace(prior, recipe=name, refines=bool(coarse)).matched_to(vqvae)
    return Recipe(name, description, vqvae, prior, coarse=coarse, **more)


# Without the warm-up the first steps at this learning rate can leave the decoder black for good (seen with seed 0).
_OURS = VQVAEConfig(ssim_weight=4.0, learning_rate=2e-3, warmup_steps=300, epochs=39)

_OUR_PRIOR = PriorConfig(
    architecture="gated", num_channels=96, kernel_size=3, num_residual_blocks=8, num_views=4, flip_left_right=True,
    max_shift=2, warmup_steps=200, weight_average=0.999, clip_norm=1.0, batch_size=8, epochs=24,
)  # fmt: skip

_KERAS_IO = VQVAEConfig(
    image_size=128, downsampling=4, width=64, num_residual_blocks=0, kernel_size=3, num_embeddings=128,
    embedding_dim=16, quantizer="gradient", ssim_weight=0.0, cosine_decay=False, batch_size=128, epochs=30,
)  # fmt: skip

_KERAS_IO_PRIOR = PriorConfig(
    condition_on=(), num_slices=0, embedding_dim=64, num_channels=128, first_kernel_size=7, kernel_size=3,
    num_residual_blocks=2, num_head_layers=2, dropout=0.0, learned_position=False, learning_rate=3e-4,
    cosine_decay=False, batch_size=128, epochs=30,
)  # fmt: skip

_RECIPES = {
    made.name: made
    for made in (
        _recipe("default128", "our choice for 128x128 slices", _OURS, _OUR_PRIOR),
        _recipe(
            "default256", "our choice for 256x256 slices: its prior refines the samples of coarse256",
            replace(_OURS, image_size=256, epochs=20),
            replace(_OUR_PRIOR, num_channels=64), coarse="coarse256",
        ),
        _recipe(
            "coarse256", "the first of two levels: a quarter of the codes of default256",
            replace(_OURS, image_size=256, downsampling=16, epochs=20), _OUR_PRIOR,
        ),
        _recipe(
            "fine128", "four times the codes of default128, whose samples its prior refines: the sharpest brains",
            replace(_OURS, downsampling=4, width=64, epochs=29),
            replace(_OUR_PRIOR, num_channels=64, epochs=18), coarse="default128",
        ),
        _recipe(
            "keras_io", "the keras.io VQ-VAE and PixelCNN examples, with an embedding in place of the one-hot input",
            _KERAS_IO, _KERAS_IO_PRIOR,
        ),
        _recipe(
            "bce_search", "full-resolution codes, cross-entropy; the winner of its grid search",
            replace(
                _KERAS_IO, image_size=256, downsampling=1, channels=(32,), latent_kernel_size=3, loss="bce",
                output_activation="sigmoid", embedding_dim=10, num_embeddings=10, learning_rate=1e-3,
                commitment_cost=0.3, upside_down_copies=True, batch_size=16,
            ),
            replace(
                _KERAS_IO_PRIOR, num_residual_blocks=0, num_head_layers=0, learning_rate=1e-4, batch_size=16,
            ),
            reported="SSIM 0.958 and 0.961; prior accuracy 0.65 in validation, 0.62 in test; samples a mass, no brain",
            grid={
                "embedding_dim": (10, 25), "num_embeddings": (10, 100), "learning_rate": (1e-4, 1e-3),
                "commitment_cost": (0.1, 0.3),
            },
            prior_grid={"learning_rate": (1e-3, 1e-4, 1e-5)},
        ),
        _recipe(
            "batchnorm_tanh", "batch normalization, sigmoid latents, tanh output; a prior with a 9x9 start",
            replace(
                _KERAS_IO, channels=(16, 32), kernel_size=4, batch_norm=True, activation="leaky_relu",
                latent_kernel_size=3, latent_activation="sigmoid", exact_mirror=True, output_activation="tanh",
                num_embeddings=64, embedding_dim=16, batch_size=32, epochs=15,
            ),
            replace(_KERAS_IO_PRIOR, num_channels=256, first_kernel_size=9, batch_size=32, epochs=300),
            reported="no number; samples like brains at 128x128 after 300 epochs, texture without shape at 256x256",
        ),
        _recipe(
            "adni_compact", "the keras.io layers on ADNI slices",
            replace(_KERAS_IO, image_size=256, batch_size=32, epochs=50), replace(_KERAS_IO_PRIOR, batch_size=32),
            reported="SSIM above 0.9 after 20 epochs; no samples",
        ),
        _recipe(
            "deep_residual", "wide 3x3 convolutions; a prior of 16 residual blocks and 16 layers after them",
            replace(
                _KERAS_IO, image_size=256, channels=(256, 128, 64), latent_kernel_size=3, num_embeddings=512,
                embedding_dim=128, batch_size=32, epochs=20,
            ),
            replace(_KERAS_IO_PRIOR, num_residual_blocks=16, num_head_layers=16, batch_size=32, epochs=100),
            reported="SSIM 0.868, the same from the codes; a few samples look like brains",
        ),
        _recipe(
            "streaming_small", "the keras.io layers, ten epochs of slices that are read as they are needed",
            replace(_KERAS_IO, image_size=256, batch_size=32, epochs=10), replace(_KERAS_IO_PRIOR, batch_size=32),
            reported="SSIM 0.915; trained on a part, since the whole did not fit into memory",
        ),
    )
}  # fmt: skip
