"""Configurations of everything that is trained, the paths, and the set-up of a session."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from oasis_vq.runtime import start_tensorflow

if TYPE_CHECKING:
    from oasis_vq.slices import SliceIndex

ROOT = Path(__file__).resolve().parents[1]
_KINDS = {bool: (bool, "True or False"), int: (int, "a whole number"), float: ((int, float), "a number")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configurations: a frozen dataclass that goes to JSON and comes back equal."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Return the configuration with these field values; the inverse of `to_dict`.

        A field that is missing takes its default: a new field's default is what was done before there was one.

        Raises:
            ValueError: if a field is unknown or has an impossible value.
        """
        unknown = sorted(set(values) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} does not fit: unknown fields {unknown}.")
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__} does not fit: {error}.") from error

    def differences(self, other: "Config") -> str:
        """Return 'field: own value, not other value' for every field that differs, joined by '; '."""
        own, others = self.to_dict(), other.to_dict()
        return "; ".join(f"{name}: {own[name]}, not {others[name]}" for name in own if own[name] != others[name])

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            if hint in _KINDS:
                kind, text = _KINDS[hint]
                fits = isinstance(getattr(self, name), kind) and (hint is bool or type(getattr(self, name)) is not bool)
                self._require(fits, f"{name} is {text}", getattr(self, name))
            if get_origin(hint) is Literal:
                options = " or ".join(repr(option) for option in get_args(hint))
                self._require(getattr(self, name) in get_args(hint), f"{name} is {options}", getattr(self, name))

    def _require(self, rule: bool, text: str, received: Any) -> None:
        if not rule:
            raise ValueError(f"{text}. Received: {received}.")


@dataclass(frozen=True, kw_only=True)
class Augmentation(Config):
    """Changes to the training slices; what is random about them is drawn anew in each epoch."""

    upside_down_copies: bool = False
    """Whether each slice is there a second time, upside down: twice the steps an epoch."""
    flip_left_right: bool = False
    """Whether half of the slices, drawn at random, are mirrored."""
    max_shift: int = 0
    """Largest random shift along each axis in pixels; black comes in."""

    def __post_init__(self):
        super().__post_init__()
        self._require(self.max_shift >= 0, "max_shift is at least 0", self.max_shift)

    @property
    def augments(self) -> bool:
        """Whether any change is asked for."""
        return bool(self.upside_down_copies or self.flip_left_right or self.max_shift)


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(Augmentation):
    """Everything that decides how a VQ-VAE is built and trained."""

    recipe: str = ""
    """Name of the recipe this came from; a prior takes the same one by default."""
    image_size: int = 128
    """Height and width of the images in pixels; a multiple of `downsampling`."""
    fit: Literal["pad", "stretch"] = "pad"
    """What becomes of a slice that is not square: black borders, or another shape."""
    downsampling: int = 8
    """Image pixels per code along each axis: 1, 2, 4, 8 or 16; one convolution of stride 2 per factor of two."""
    width: int = 96
    """Channels at the resolution of the codes; halved at each finer resolution."""
    channels: tuple[int, ...] = ()
    """Channels of each convolution of the encoder in place of what `width` makes of them; those after the strided ones
    have stride 1. The decoder mirrors them."""
    kernel_size: int = 4
    """Side of these convolutions; even sides share evenly between strides of 2 (no checkerboard)."""
    latent_kernel_size: int = 1
    """Side of the convolution that makes the latents."""
    exact_mirror: bool = False
    """Whether a decoder without residual blocks is the encoder turned round, from the latents on, its last transposed
    convolution making the image; else a 3x3 convolution after those of `channels` does, as in the keras.io example."""
    batch_norm: bool = False
    """Whether batch normalization follows these convolutions and the 3x3 ones of residual blocks."""
    activation: Literal["relu", "leaky_relu", "silu", "gelu"] = "relu"
    """Between layers; the leaky one has slope 0.2."""
    latent_activation: Literal["linear", "sigmoid", "tanh"] = "linear"
    """Of the latents."""
    output_activation: Literal["linear", "sigmoid", "tanh"] = "linear"
    """Of the image; tanh is brought from [-1, 1] to [0, 1]."""
    num_residual_blocks: int = 2
    """Residual blocks at the resolution of the codes, in the encoder and in the decoder (van den Oord et al. 2017)."""
    num_embeddings: int = 512
    """Vectors in the codebook, K."""
    embedding_dim: int = 32
    """Length of a codebook vector, D."""
    quantizer: Literal["gradient", "ema"] = "ema"
    """How the codebook learns: by moving averages (van den Oord et al. 2017, appendix A.1), or by gradient (eq. 3), as
    that of the published systems, of which few codes stay in use."""
    commitment_cost: float = 0.25
    """Weight of the commitment term, beta (van den Oord et al. 2017, eq. 3)."""
    loss: Literal["mse", "bce", "l1"] = "mse"
    """Squared error over the data's variance, binary cross-entropy, or absolute error over the standard deviation."""
    ssim_weight: float = 0.5
    """Weight of 1 - SSIM beside that loss; 0 leaves it out."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Of the convolutions; quantizer and losses compute in float32."""
    jit_compile: bool | None = None
    """Whether XLA compiles the training step; None leaves it to Keras: yes on one GPU, no on several and on CPUs,
    where it is slower."""
    learning_rate: float = 1e-3
    """Adam's learning rate; at its highest if it rises or decays."""
    warmup_steps: int = 0
    """Steps, at most a quarter of all, in which the learning rate, with `cosine_decay`, and the weight of the SSIM rise
    to their values."""
    cosine_decay: bool = True
    """Whether the learning rate falls to zero along a half cosine."""
    batch_size: int = 16
    """Images per step."""
    epochs: int = 25
    """Passes over the training slices."""
    seed: int = 0
    """Seed of the weights and of the order of the slices."""

    def __post_init__(self):
        super().__post_init__()
        self._require(0 <= self.seed < 2**32, "seed is from 0 to below 2**32", self.seed)
        self._require(self.downsampling in (1, 2, 4, 8, 16), "downsampling is 1, 2, 4, 8 or 16", self.downsampling)
        nearest = max(1, round(self.image_size / self.downsampling)) * self.downsampling
        self._require(
            self.image_size == nearest,
            f"image_size is a multiple of downsampling ({self.downsampling}), for example {nearest}",
            self.image_size,
        )
        self._require(self.ssim_weight == 0 or self.image_size >= 11, "SSIM needs 11 pixels or more", self.image_size)
        for name in ("num_residual_blocks", "commitment_cost", "ssim_weight", "learning_rate", "warmup_steps"):
            self._require(getattr(self, name) >= 0, f"{name} is at least 0", getattr(self, name))
        self._require(self.max_shift < self.image_size, "max_shift is below image_size", self.max_shift)
        for name in (
            "width", "kernel_size", "latent_kernel_size", "num_embeddings", "embedding_dim", "batch_size", "epochs",
        ):  # fmt: skip
            self._require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))
        num_strided = self.downsampling.bit_length() - 1
        self._require(
            isinstance(self.channels, tuple)
            and (not self.channels or len(self.channels) >= num_strided)
            and all(isinstance(number, int) and number >= 1 for number in self.channels),
            f"channels are a tuple of at least {num_strided} whole numbers from 1 on, or ()",
            self.channels,
        )
        self._require(
            self.loss != "bce" or self.output_activation == "sigmoid",
            "the loss 'bce' needs output_activation 'sigmoid'",
            self.output_activation,
        )

    @property
    def encoder_channels(self) -> tuple[int, ...]:
        """Channels of each convolution of the encoder, finest resolution first."""
        stages = max(1, self.downsampling.bit_length() - 1)
        return self.channels or tuple(max(1, self.width >> (stages - 1 - stage)) for stage in range(stages))

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each convolution of the encoder: twos until the resolution of the codes is reached, then ones."""
        num_strided = self.downsampling.bit_length() - 1
        return tuple(2 if stage < num_strided else 1 for stage in range(len(self.encoder_channels)))

    @property
    def bits_per_image(self) -> float:
        """Bits that the codes of one image take, all codes being equally long: positions times log2(num_embeddings)."""
        return math.prod(self.grid_shape) * math.log2(self.num_embeddings)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the code grid."""
        return (self.image_size // self.downsampling,) * 2

    def quick(self) -> "VQVAEConfig":
        """Return a small version for a cohort of 24: 2 CPU minutes, the fewer epochs the more codes.

        Images are at most 128x128, and code grids 64x64.
        """
        return dataclasses.replace(
            self,
            image_size=min(self.image_size, 128, 64 * self.downsampling),
            width=min(self.width, 64),
            channels=tuple(min(number, 32) for number in self.channels),
            num_embeddings=min(self.num_embeddings, 256),
            num_residual_blocks=min(self.num_residual_blocks, 1),
            batch_size=min(self.batch_size, 16),
            epochs=min(40, max(4, self.downsampling**2)),
        )


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Config):
    """Everything that decides how a PixelCNN prior is built and trained."""

    recipe: str = ""
    """Name of the recipe this came from."""
    grid_shape: tuple[int, int] = (16, 16)
    """Rows and columns of the code grid."""
    num_embeddings: int = 512
    """Codes to choose from at each position, K."""
    condition_on: tuple[Literal["slice_index", "label"], ...] = ("slice_index", "label")
    """What the prior is told of a grid, where the data have it."""
    first_slice: int = 0
    """Number of the lowest slice position; taken from the data."""
    num_slices: int = 32
    """Slice positions, from `first_slice` on; taken from the data, 0 if they are not conditioned on."""
    skipped_slices: tuple[int, ...] = ()
    """Slice positions among these that no training slice has, so that the prior knows nothing of them; taken from the
    data."""
    num_labels: int = 0
    """Class labels; taken from the data, 0 if there are none or they are not conditioned on."""
    refines: bool = False
    """Whether a draft of the whole grid is given: the codes of what a coarser VQ-VAE makes of the slice. A coarse prior
    and one that refines are two levels, as in VQ-VAE-2 (Razavi et al. 2019), of two VQ-VAEs."""
    condition_dropout: float = 0.1
    """Share of the training grids whose condition is hidden, so that the prior also works without one; where there are
    several, for half of that share all of them, else one."""
    architecture: Literal["residual", "gated"] = "residual"
    """One stack of masked convolutions (van den Oord et al. 2016a), or gated vertical and horizontal ones, without the
    other's blind spot (van den Oord et al. 2016b)."""
    embedding_dim: int = 64
    """Length of the learned vector that stands for a code at the input."""
    num_channels: int = 128
    """Channels of the stacks; masked convolutions in blocks of the residual one have half as many."""
    first_kernel_size: int = 7
    """Side of the first convolution, which leaves out the own position; odd."""
    kernel_size: int = 5
    """Side of the convolutions of the blocks; odd."""
    num_residual_blocks: int = 8
    """Blocks after the first convolution."""
    num_attention_layers: int = 0
    """Layers of attention to all positions before, spread among the blocks (Chen et al. 2018, PixelSNAIL)."""
    num_attention_heads: int = 4
    """Heads of each; a divisor of `num_channels`."""
    num_head_layers: int = 1
    """1x1 layers with ReLU between the last block and the logits."""
    dropout: float = 0.1
    """Share of channels dropped inside each residual block while training."""
    learned_position: bool = True
    """Whether each grid position adds a learned vector, so that the network knows where it is."""
    num_views: int = 1
    """How often each training slice is encoded: as it is, and then with changes drawn anew each time. An epoch takes
    one view of each slice."""
    flip_left_right: bool = False
    """Whether half of the views beyond the first are mirrored."""
    max_shift: int = 0
    """Largest random shift of these views along each axis in pixels; black comes in."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Of the layers; logits and losses are float32."""
    jit_compile: bool | None = None
    """Whether XLA compiles the training step; None leaves it to Keras: yes on one GPU, no on several and on CPUs,
    where it is slower."""
    learning_rate: float = 1e-3
    """Adam's learning rate; at its highest if it rises or decays."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its value, at most a quarter of all; only with `cosine_decay`."""
    cosine_decay: bool = True
    """Whether the learning rate falls to zero along a half cosine."""
    weight_average: float = 0.0
    """Momentum of the moving average of the weights, which is what is validated and saved, lower in a short training;
    0 for none (Polyak and Juditsky 1992)."""
    clip_norm: float = 0.0
    """Largest norm of the gradient of all weights together; 0 for no limit (Pascanu et al. 2013)."""
    batch_size: int = 32
    """Code grids per step."""
    epochs: int = 25
    """Passes over the training grids."""
    patience: int = 0
    """Epochs without a better validation after which the training ends; 0 for never."""
    seed: int = 0
    """Seed of the weights, of dropout and of the order of the grids."""

    def __post_init__(self):
        super().__post_init__()
        self._require(0 <= self.seed < 2**32, "seed is from 0 to below 2**32", self.seed)
        self._require(len(self.grid_shape) == 2 and min(self.grid_shape) >= 1, "grid_shape is (h, w)", self.grid_shape)
        for name in (
            "warmup_steps", "clip_norm", "patience", "learning_rate", "num_residual_blocks", "num_head_layers",
            "max_shift",
        ):  # fmt: skip
            self._require(getattr(self, name) >= 0, f"{name} is at least 0", getattr(self, name))
        for name in ("weight_average", "dropout", "condition_dropout"):
            self._require(0 <= getattr(self, name) < 1, f"{name} is from 0 to below 1", getattr(self, name))
        names = ("slice_index", "label")
        self._require(set(self.condition_on) <= set(names), f"condition_on is among {names}", self.condition_on)
        for name in ("first_kernel_size", "kernel_size"):
            least = 3 if name == "first_kernel_size" else 1
            rule = f"{name} is odd, and at least {least}"
            self._require(getattr(self, name) % 2 == 1 and getattr(self, name) >= least, rule, getattr(self, name))
        layers, heads = self.num_attention_layers, self.num_attention_heads
        self._require(
            0 <= layers < max(1, self.num_residual_blocks),
            "num_attention_layers is at least 0, and below num_residual_blocks",
            layers,
        )
        self._require(
            not layers or math.prod(self.grid_shape) <= 64**2, "attention is for grids to 64x64", self.grid_shape
        )
        self._require(
            not layers or (heads >= 1 and self.num_channels % heads == 0),
            f"num_attention_heads divides num_channels ({self.num_channels})",
            heads,
        )
        for name in ("num_embeddings", "num_channels", "embedding_dim", "batch_size", "epochs", "num_views"):
            self._require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))

    @property
    def augmentation(self) -> Augmentation:
        """The changes to the slices in views beyond the first."""
        return Augmentation(flip_left_right=self.flip_left_right, max_shift=self.max_shift)

    def matched_to(self, vqvae: VQVAEConfig) -> "PriorConfig":
        """Return this configuration with the code grid and the codebook size of a VQ-VAE."""
        return dataclasses.replace(self, grid_shape=vqvae.grid_shape, num_embeddings=vqvae.num_embeddings)

    def conditioned_by(self, index: "SliceIndex") -> "PriorConfig":
        """Return this configuration with the slice positions and labels that there are, of those in `condition_on`."""
        first, last = index.slice_range if "slice_index" in self.condition_on else (0, -1)
        skipped = index.skipped_slices if "slice_index" in self.condition_on else ()
        num_labels = index.num_labels if "label" in self.condition_on else 0
        return dataclasses.replace(
            self, first_slice=first, num_slices=last - first + 1, skipped_slices=skipped, num_labels=num_labels
        )

    def quick(self) -> "PriorConfig":
        """Return a small version for a cohort of 24: 2 CPU minutes on a 16x16 grid, fewer epochs on a larger one."""
        channels, blocks = min(self.num_channels, 48), min(self.num_residual_blocks, 4)
        return dataclasses.replace(
            self,
            num_embeddings=min(self.num_embeddings, 256),
            num_channels=channels,
            num_residual_blocks=blocks,
            num_attention_layers=max(0, min(self.num_attention_layers, blocks - 1)),
            num_attention_heads=math.gcd(self.num_attention_heads, channels),
            num_head_layers=min(self.num_head_layers, 4),
            num_views=1,
            batch_size=min(self.batch_size, 8),
            epochs=max(2, min(15, 15 * 256 // math.prod(self.grid_shape))),
        )


@dataclass(frozen=True)
class Paths:
    """Where things are; each is overridable by an environment variable."""

    data: Path | None = field(default_factory=lambda: _path("OASIS_VQ_DATA", None))
    """Folder with slices (`OASIS_VQ_DATA`), or None: a phantom cohort is made."""
    phantom: Path = field(default_factory=lambda: _path("OASIS_VQ_PHANTOM", ROOT / "data"))
    """Folder in which phantom cohorts are made (`OASIS_VQ_PHANTOM`)."""
    cache: Path = field(default_factory=lambda: _path("OASIS_VQ_CACHE", ROOT / "data" / "cache"))
    """Folder of decoded slices (`OASIS_VQ_CACHE`); it may be removed at any time."""
    models: Path = field(default_factory=lambda: _path("OASIS_VQ_MODELS", ROOT / "saved_models"))
    """Folder of the model folders (`OASIS_VQ_MODELS`)."""
    figures: Path = field(default_factory=lambda: _path("OASIS_VQ_FIGURES", ROOT / "build" / "figures"))
    """Folder that `save_figure` writes (`OASIS_VQ_FIGURES`); the committed figures are written by `make figures`."""


def _path(variable: str, default: Path | None) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else default


def profile() -> str:
    """Return 'quick' or 'full': how much the notebooks train (`OASIS_VQ_PROFILE`, quick if unset)."""
    value = os.environ.get("OASIS_VQ_PROFILE") or "quick"
    if value not in ("quick", "full"):
        raise ValueError(f"OASIS_VQ_PROFILE is 'quick' or 'full'. Received: {value}.")
    return value


def limit_train() -> int | None:
    """Return how many training subjects the notebooks use at most (`OASIS_VQ_LIMIT_TRAIN`, all if unset)."""
    value = os.environ.get("OASIS_VQ_LIMIT_TRAIN") or None
    if value is not None and not (value.isdecimal() and int(value) >= 1):
        raise ValueError(f"OASIS_VQ_LIMIT_TRAIN is a number from 1 on. Received: {value}.")
    return None if value is None else int(value)


def setup(seed: int = 0, *, deterministic: bool = False) -> None:
    """Prepare a session, and print the device, the data folder and the profile.

    Seeds Python, NumPy and TensorFlow, quiets TensorFlow's logs, and lets GPU memory grow. Call it first: the logs
    are quiet only if TensorFlow has not been imported yet; set TF_CPP_MIN_LOG_LEVEL=0 to see them.

    Args:
        seed: of the session; trainings have their own.
        deterministic: whether the same session, run anew, gives bit-identical results on the same machine.
    """
    print(f"device:  {start_tensorflow(seed, deterministic=deterministic)}")
    data = Paths().data
    print(f"data:    {data.name if data else 'phantom cohort (OASIS_VQ_DATA is not set)'}")
    print(f"profile: {profile()}")
