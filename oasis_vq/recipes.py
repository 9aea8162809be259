"""Named pairs of configurations: one VQ-VAE and the prior over its codes."""

import dataclasses
from dataclasses import dataclass

from oasis_vq.config import PriorConfig, VQVAEConfig


@dataclass(frozen=True)
class Recipe:
    """A VQ-VAE and a prior that fit each other."""

    name: str
    description: str
    vqvae: VQVAEConfig
    prior: PriorConfig

    def quick(self) -> "Recipe":
        """Return the recipe with both configurations made small: minutes on a CPU."""
        return dataclasses.replace(self, vqvae=self.vqvae.quick(), prior=self.prior.quick())


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


def _recipe(name: str, description: str, vqvae: VQVAEConfig, prior: PriorConfig) -> Recipe:
    vqvae = dataclasses.replace(vqvae, recipe=name)
    return Recipe(name, description, vqvae, dataclasses.replace(prior, recipe=name).matched_to(vqvae))


# Without the warm-up the first steps at this learning rate can leave the decoder black for good (seen with seed 0).
_OURS = VQVAEConfig(ssim_weight=4.0, learning_rate=2e-3, warmup_steps=300, epochs=39)

_OUR_PRIOR = PriorConfig(
    architecture="gated", num_channels=96, kernel_size=3, num_residual_blocks=8, num_views=4, flip_left_right=True,
    max_shift=2, warmup_steps=200, weight_average=0.998, clip_norm=1.0, epochs=24,
)  # fmt: skip

_RECIPES = {
    made.name: made
    for made in (
        _recipe(
            "keras_io",
            "the keras.io VQ-VAE and PixelCNN examples, with an embedding in place of the one-hot input",
            VQVAEConfig(
                image_size=128, downsampling=4, width=64, num_residual_blocks=0, kernel_size=3,
                num_embeddings=128, embedding_dim=16, quantizer="gradient",
                ssim_weight=0.0, cosine_decay=False, batch_size=128, epochs=30,
            ),
            PriorConfig(
                condition_on=(), num_slices=0, embedding_dim=64, num_channels=128, first_kernel_size=7, kernel_size=3,
                num_residual_blocks=2, num_head_layers=2, dropout=0.0, learned_position=False, learning_rate=3e-4,
                cosine_decay=False, batch_size=128, epochs=30,
            ),
        ),
        _recipe("default128", "our choice for 128x128 slices", _OURS, _OUR_PRIOR),
        _recipe(
            "default256", "our choice for 256x256 slices",
            dataclasses.replace(_OURS, image_size=256, epochs=20), dataclasses.replace(_OUR_PRIOR, batch_size=16),
        ),
        _recipe(
            "fine128", "four times the codes of default128: the best reconstructions, a longer code for the prior",
            dataclasses.replace(_OURS, downsampling=4, width=64, epochs=29),
            dataclasses.replace(_OUR_PRIOR, batch_size=16),
        ),
    )
}  # fmt: skip
