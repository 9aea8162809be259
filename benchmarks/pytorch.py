"""The peer of our VQ-VAE in PyTorch: same layers, loss and optimizer, two quantizers, each in its best of three ways.

python benchmarks/pytorch.py FOLDER is the process that measures them; FOLDER takes what the compiler makes.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from training import STEPS, make_config
from turns import serve
from vector_quantize_pytorch import VectorQuantize

from oasis_vq.config import VQVAEConfig


class PlainQuantizer(nn.Module):
    """Nearest vector by argmin over all distances, lookup, straight-through gradient, both terms of the loss."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.commitment_cost = config.commitment_cost
        bound = 1 / config.num_embeddings
        self.codebook = nn.Parameter(torch.empty(config.num_embeddings, config.embedding_dim).uniform_(-bound, bound))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = latents.permute(0, 2, 3, 1)  # (b, h, w, d)
        flat = latents.reshape(-1, latents.shape[-1])
        with torch.no_grad():
            codes = torch.argmin(self.codebook.square().sum(1) - 2 * flat @ self.codebook.T, dim=1)
        vectors = F.embedding(codes, self.codebook).view_as(latents)
        codebook_term = F.mse_loss(vectors, latents.detach())
        loss = codebook_term + self.commitment_cost * F.mse_loss(latents, vectors.detach())
        return (latents + (vectors - latents).detach()).permute(0, 3, 1, 2), loss


class StandardQuantizer(nn.Module):
    """vector-quantize-pytorch's quantizer with its standard settings: moving averages, no restarts."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.quantize = VectorQuantize(
            dim=config.embedding_dim, codebook_size=config.num_embeddings, accept_image_fmap=True
        )

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, _, loss = self.quantize(latents)
        return quantized, loss.sum()


class Network(nn.Module):
    """Layers of the `keras_io` recipe: strided convolutions with ReLU, a 1x1 to the latents, their mirror, a 3x3.

    TensorFlow pads a convolution of stride 2 at the end, PyTorch on both sides: the same sizes and work.
    """

    def __init__(self, config: VQVAEConfig, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer
        channels, padding = config.encoder_channels, config.kernel_size // 2
        options = {"kernel_size": config.kernel_size, "padding": padding}
        encoder, before = [], 1
        for after, stride in zip(channels, config.strides, strict=True):
            encoder += [nn.Conv2d(before, after, stride=stride, **options), nn.ReLU()]
            before = after
        decoder, below = [], config.embedding_dim
        for after, stride in zip(channels[::-1], config.strides[::-1], strict=True):
            options["output_padding"] = stride - 1
            decoder += [nn.ConvTranspose2d(below, after, stride=stride, **options), nn.ReLU()]
            below = after
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(before, config.embedding_dim, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(below, 1, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the loss of images (b, 1, size, size)."""
        quantized, loss = self.quantizer(self.encoder(images))
        return F.mse_loss(self.decoder(quantized), images) + loss


WAYS = ("eager", "eager, channels_last", "torch.compile")


def measured(quantizer: type[nn.Module], way: str) -> Callable[[], float]:
    """Return a function that trains for a few steps and returns images a second."""
    torch.manual_seed(0)
    config = make_config()
    images = torch.rand(config.batch_size, 1, config.image_size, config.image_size)
    network = Network(config, quantizer(config))
    if way == "eager, channels_last":
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    if way == "torch.compile":
        network.compile()

    def measure(steps: int = STEPS) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = network(images)
            loss.backward()
            optimizer.step()
        loss.item()
        return steps * config.batch_size / (time.perf_counter() - start)

    measure(2)
    return measure


def best_way(quantizer: type[nn.Module]) -> tuple[str, Callable[[], float]]:
    """Return the fastest way to run the network with a quantizer, and the function that measures it."""
    ways, failed = {}, ""
    for way in WAYS:
        try:
            ways[way] = measured(quantizer, way)
        except Exception as error:
            if way != "torch.compile":
                raise
            print(f"torch.compile: {error}", file=sys.stderr)
            failed = "; torch.compile fails here"
    best = max(ways, key=lambda way: ways[way]())
    return best + failed, ways[best]


def main() -> None:
    """Serve each quantizer, run in the way that suits it best."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[1]
    torch.set_num_threads(os.cpu_count())
    measures = {}
    for name, quantizer in (("plain quantizer", PlainQuantizer), ("vector-quantize-pytorch", StandardQuantizer)):
        way, measure = best_way(quantizer)
        measures[f"PyTorch, {name} ({way})"] = measure
    serve(measures)


if __name__ == "__main__":
    main()
