"""Configurations, recipes and paths."""

import ast
import dataclasses
import inspect
import itertools

import pytest

import oasis_vq as ovq
from oasis_vq.config import Paths


@pytest.mark.parametrize("name", ovq.recipe_names())
def test_recipes_go_to_json_and_come_back(name):
    for profile in ("full", "quick"):
        recipe = ovq.recipe(name, profile=profile)
        for config in (recipe.vqvae, recipe.prior):
            assert type(config).from_dict(config.to_dict()) == config and config.recipe == name
        assert recipe.prior == recipe.prior.matched_to(recipe.vqvae)
    quick = ovq.recipe(name, profile="quick")
    assert quick.vqvae.image_size <= 128 and max(quick.prior.grid_shape) <= 64
    assert (quick.vqvae.image_size == 64) == (name == "bce_search")


def test_small_version_of_a_prior_with_attention():
    config = ovq.PriorConfig(num_attention_layers=5, num_attention_heads=32, num_channels=128)
    quick = config.quick()
    assert (quick.num_residual_blocks, quick.num_attention_layers, quick.num_attention_heads) == (4, 3, 16)


def test_levels_of_a_recipe_fit_each_other():
    levels = [(ovq.recipe(name, profile=kind), kind) for name in ovq.recipe_names() for kind in ("full", "quick")]
    levels = [(fine, ovq.recipe(fine.coarse, profile=kind)) for fine, kind in levels if fine.coarse]
    assert levels
    for fine, coarse in levels:
        assert coarse.vqvae.image_size == fine.vqvae.image_size and coarse.vqvae.fit == fine.vqvae.fit
        assert coarse.vqvae.downsampling > fine.vqvae.downsampling
        assert fine.prior.refines and not coarse.prior.refines and not coarse.coarse


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"one of default128, .*keras_io.* Received: best"):
        ovq.recipe("best")
    values = ovq.VQVAEConfig().to_dict()
    wrong_kinds = [("epochs", "3"), ("epochs", 3.0), ("epochs", True), ("batch_norm", "True"), ("learning_rate", None)]
    for field, value in wrong_kinds:
        with pytest.raises(ValueError, match=rf"{field} is (a whole number|True or False|a number). Received: {value}"):
            ovq.VQVAEConfig.from_dict({**values, field: value})
    with pytest.raises(ValueError, match=r"channels are a tuple .* Received: \[8, 8, 8\]"):
        ovq.VQVAEConfig(channels=[8, 8, 8])
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        ovq.VQVAEConfig.from_dict({**values, "colour": 3})
    older = {name: value for name, value in values.items() if name != "fit"}
    assert ovq.VQVAEConfig.from_dict(older) == ovq.VQVAEConfig()  # what was done before there was a choice
    for field, value in (
        ("downsampling", 3),
        ("epochs", 0),
        ("quantizer", "magic"),
        ("image_size", 0),
        ("ssim_weight", -1),
        ("seed", -1),
        ("seed", 2**32),
    ):
        with pytest.raises(ValueError, match=rf"{field}.* Received: {value}"):
            ovq.VQVAEConfig(**{field: value})
    for field, value in (
        ("kernel_size", 4),
        ("kernel_size", -1),
        ("first_kernel_size", 1),
        ("dropout", 1.5),
        ("patience", -1),
        ("num_attention_layers", 8),
        ("architecture", "plain"),
    ):
        with pytest.raises(ValueError, match=rf"{field} is .* Received: {value}"):
            ovq.PriorConfig(**{field: value})
    with pytest.raises(ValueError, match=r"num_attention_heads divides num_channels \(128\). Received: 3"):
        ovq.PriorConfig(num_attention_layers=1, num_attention_heads=3)
    with pytest.raises(ValueError, match=r"attention is for grids to 64x64"):
        ovq.PriorConfig(num_attention_layers=1, grid_shape=(128, 128))


def test_differences_name_both_values():
    config = ovq.PriorConfig()
    assert config.differences(config) == ""
    assert config.differences(dataclasses.replace(config, dropout=0.5)) == "dropout: 0.1, not 0.5"


def test_every_field_is_documented():
    for config in (ovq.VQVAEConfig, ovq.PriorConfig):
        body = ast.parse(inspect.getsource(config)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), ast.unparse(field)


def test_paths_follow_the_environment(monkeypatch, tmp_path):
    for variable in ("OASIS_VQ_DATA", "OASIS_VQ_MODELS", "OASIS_VQ_FIGURES"):
        monkeypatch.delenv(variable, raising=False)
    assert Paths().data is None and Paths().models.name == "saved_models"
    monkeypatch.setenv("OASIS_VQ_MODELS", str(tmp_path))
    assert Paths().models == tmp_path
    monkeypatch.setenv("OASIS_VQ_PROFILE", "fast")
    with pytest.raises(ValueError, match=r"OASIS_VQ_PROFILE is 'quick' or 'full'. Received: fast"):
        ovq.profile()


def test_setup_prints_device_and_data_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OASIS_VQ_DATA", str(tmp_path / "my_slices"))
    ovq.setup(seed=1)
    out = capsys.readouterr().out
    assert "TensorFlow" in out and "my_slices" in out and str(tmp_path) not in out
