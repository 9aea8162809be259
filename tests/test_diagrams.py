"""Diagrams: what they say is what the models are."""

import dataclasses

import matplotlib.pyplot as plt
import pytest

import oasis_vq as ovq
from oasis_vq.diagrams import prior_stages, vqvae_stages

RECIPES = ("default128", "bce_search", "batchnorm_tanh", "deep_residual", "keras_io")


def small(name: str, **changes) -> ovq.VQVAE:
    return ovq.VQVAE(dataclasses.replace(ovq.recipe(name).vqvae, image_size=32, **changes))


def small_prior(name: str, **changes) -> ovq.PixelCNN:
    return ovq.PixelCNN(dataclasses.replace(ovq.recipe(name).prior, grid_shape=(6, 5), **changes))


def num_weights(stages) -> int:
    return sum(stage.times * stage.num_weights for stage in stages)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_and_shapes_of_a_vqvae_are_those_of_its_networks(name):
    vqvae = small(name)
    stages = vqvae_stages(vqvae)
    for part, network in (("encoder", vqvae.encoder), ("decoder", vqvae.decoder)):
        own = [stage for stage in stages if stage.part == part]
        assert num_weights(own) == network.count_params()
        assert own[-1].shape == network.output_shape[1:]
        convolutions = [layer for layer in network.layers if hasattr(layer, "kernel_size")]
        blocks = sum(stage.times for stage in own if stage.text.startswith("residual block"))
        assert sum(stage.times for stage in own) == len(convolutions) - blocks  # a block has two of them
    assert stages[0].shape == stages[-1].shape == (32, 32, 1)


def test_a_stage_says_what_its_layers_do():
    first, *_, residual, latents = [s for s in vqvae_stages(small("default128")) if s.part == "encoder"]
    assert str(first) == "Conv2D 4×4, stride 2, relu\n16×16×24\n408 weights"
    assert str(residual).startswith("2 × residual block 3×3, 1×1\n4×4×96\n2 × ")
    assert latents.text == "Conv2D 1×1"


@pytest.mark.parametrize(
    ("name", "attention"), [("default128", 0), ("default128", 1), ("keras_io", 0), ("keras_io", 1), ("bce_search", 0)]
)
def test_weights_of_a_prior_are_all_drawn(name, attention):
    prior = small_prior(name, num_attention_layers=attention, num_slices=3)
    given = sum(layer.count_params() for layer in prior.condition_embeddings.values())
    weights = sum(num_weights(column) for column in prior_stages(prior))
    assert weights + given + prior.position.shape.num_elements() == prior.count_params()
    texts = [stage.text for column in prior_stages(prior) for stage in column]
    assert texts.count("causal attention") == attention


def test_a_gated_block_is_two_boxes_and_the_last_has_fewer_weights():
    columns = [column for column in prior_stages(small_prior("default128")) if len(column) == 2]
    assert [column[0].times for column in columns] == [1, 7, 1]
    assert [column[0].text for column in columns] == ["vertical 3×7, gate", "vertical 2×3, gate", "vertical 2×3"]
    assert [stage.is_told for column in columns for stage in column] == [True, True, True, True, False, True]
    assert columns[2][1].num_weights < columns[1][1].num_weights


@pytest.mark.parametrize("name", RECIPES)
def test_texts_stay_in_their_boxes(name):
    for figure in (ovq.plot_vqvae(small(name)), ovq.plot_prior(small_prior(name, num_slices=3))):
        axis = figure.axes[0]
        figure.canvas.draw()
        boxes = [patch.get_window_extent() for patch in axis.patches if hasattr(patch, "get_boxstyle")]
        texts = [text.get_window_extent() for text in axis.texts if "×" in text.get_text()]
        assert len(texts) >= 4
        for text in texts:
            assert any(
                box.x0 <= text.x0 and text.x1 <= box.x1 and box.y0 <= text.y0 and text.y1 <= box.y1 for box in boxes
            )
        plt.close(figure)
