"""Grid searches: every combination, the best in validation, one test score, and nothing is trained twice."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import VQVAE_CONFIG

import oasis_vq as ovq
from oasis_vq import search
from oasis_vq.__main__ import main
from oasis_vq.search import candidates, table


def test_grid_of_the_published_search():
    names = list(candidates(ovq.recipe("bce_search").grid))
    assert len(names) == len(set(names)) == 16
    assert names[0] == "embedding_dim=10,num_embeddings=10,learning_rate=0.0001,commitment_cost=0.1"
    winner = "embedding_dim=10,num_embeddings=10,learning_rate=0.001,commitment_cost=0.3"
    recipe = ovq.recipe("bce_search")
    assert all(getattr(recipe.vqvae, field) == value for field, value in candidates(recipe.grid)[winner].items())
    assert recipe.prior.learning_rate in recipe.prior_grid["learning_rate"]


def test_best_in_validation_wins_and_nothing_is_trained_twice(tmp_path, index):
    config = dataclasses.replace(VQVAE_CONFIG, epochs=2)
    grid = {"num_embeddings": [32], "learning_rate": [1e-6, 1e30, 3e-3]}
    found = ovq.grid_search(tmp_path / "s", config, grid, index)
    scores = [row["brain_ssim"] for row in found["candidates"]]
    best = found["candidates"][0]
    assert len(scores) == 3 and scores[0] > scores[1] and best["name"] == "num_embeddings=32,learning_rate=0.003"
    assert np.isnan(scores[2])  # it diverges
    for split, value in (("test", found["test"]["brain_ssim"]), ("validate", best["brain_ssim"])):
        report = ovq.evaluate_reconstruction(ovq.load_vqvae(tmp_path / "s" / best["name"]), index.splits()[split])
        assert report["brain_ssim"] == value
    written = json.loads((tmp_path / "s" / "search.json").read_text())
    assert [row["name"] for row in written["candidates"]] == [row["name"] for row in found["candidates"]]
    assert table(found).splitlines()[1].startswith(best["name"])

    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").glob("*/model.keras")}
    again = ovq.grid_search(tmp_path / "s", config, {**grid, "learning_rate": [1e-6, 3e-3]}, index)
    assert len(trained) == 2 and all(file.stat().st_mtime_ns == time for file, time in trained.items())
    assert again["candidates"][0] == best and again["test"] == found["test"]

    with pytest.raises(ValueError, match="a value or more for each"):
        ovq.grid_search(tmp_path / "s", config, {"seed": []}, index)
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        ovq.grid_search(tmp_path / "s", config, {"colour": [1]}, index)


@pytest.mark.slow
def test_search_that_was_begun_anew_and_stopped_goes_on(tmp_path, index, monkeypatch):
    config, grid = dataclasses.replace(VQVAE_CONFIG, epochs=2), {"learning_rate": [1e-6, 3e-3]}
    found = ovq.grid_search(tmp_path / "s", config, grid, index)
    train, anew = search.fit_or_load, []

    def stop_at_the_second(*words, restart=False, **options):
        anew.append(restart)
        if len(anew) == 2:
            raise KeyboardInterrupt
        return train(*words, restart=restart, **options)

    monkeypatch.setattr(search, "fit_or_load", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ovq.grid_search(tmp_path / "s", config, grid, index, restart=True)
    restarted = ovq.grid_search(tmp_path / "s", config, grid, index, restart=True)
    assert anew == [True, True, False, True, False]  # the last loads the winner
    assert restarted["test"] == found["test"] and not (tmp_path / "s" / "restarted").exists()


def test_scores_that_are_none_come_last(tmp_path, index):
    """Of validation slices without brain; JSON has no NaN."""
    (tmp_path / "metrics.json").write_text('{"validate_brain_ssim": null, "validate_ssim": 0.5}')
    scores = search._scores(SimpleNamespace(folder=tmp_path), index)
    assert search._loss(scores) == math.inf and scores["ssim"] == 0.5


@pytest.mark.slow
def test_search_among_priors_by_command(tmp_path, models, cohort, vqvae, capsys):
    words = ["search", "--data", cohort, "--vqvae", models / "small", "--recipe", "bce_search", "--epochs", 2]
    assert main([str(word) for word in (*words, "--grid", "learning_rate=3e-3,1e-6", "--out", tmp_path / "s")]) == 0
    found = json.loads((tmp_path / "s" / "search.json").read_text())
    bits = [row["bits_per_code"] for row in found["candidates"]]
    assert bits[0] < bits[1] and found["candidates"][0]["changes"] == {"learning_rate": 3e-3}
    assert 0 < found["test"]["bits_per_code"] < math.log2(VQVAE_CONFIG.num_embeddings)
    assert {file.name for file in (tmp_path / "s").glob("search.*")} == {"search.json", "search.png", "search.pdf"}
    assert "The winner on the test split: bits_per_code" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--grid", "learning_rate"), "field=value,value"),
        (("--grid", "epochs=1", "epochs=2"), "each field once"),
        (("--grid", "learned_position=yes,no"), "learned_position is True or False. Received: yes"),
        (("--recipe", "keras_io"), "has no grid"),
        (("--image-size", 64), "that of the VQ-VAE"),
    ],
)
def test_what_cannot_be_searched_is_told(tmp_path, models, cohort, vqvae, capsys, wrong, said):
    words = ["search", "--data", cohort, "--vqvae", models / "small", "--recipe", "bce_search", "--out", tmp_path / "t"]
    assert main([str(word) for word in (*words, *wrong)]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "t").exists()
