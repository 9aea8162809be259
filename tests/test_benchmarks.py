"""The benchmark of the quantizers times the same thing: equal gradients, and a check that sees if they are not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quantizer as benchmark


def test_gradients_equal_those_of_the_one_hot_formulation():
    latents, upstream, codebook = benchmark.make_inputs((2, 4, 6, 5), 12)
    names = (benchmark.PEER, "VectorQuantizer", "EMAVectorQuantizer")
    theirs, ours, moving = (benchmark.make_step(name, codebook)(latents, upstream) for name in names)
    assert [gradient.shape for gradient in ours] == [latents.shape, codebook.shape] and len(moving) == 1
    benchmark.check_equal(ours, theirs)
    with pytest.raises(AssertionError):
        benchmark.check_equal([ours[0], 1.001 * ours[1]], theirs)
