"""The benchmarks time the same thing and ask no test people, and the table of reproductions says what was found."""

import json
import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import oasis_vq as ovq

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import generation
import quantizer as benchmark
import reproduce


def test_gradients_equal_those_of_the_one_hot_formulation():
    latents, upstream, codebook = benchmark.make_inputs((2, 4, 6, 5), 12)
    names = (benchmark.PEER, "VectorQuantizer", "EMAVectorQuantizer")
    theirs, ours, moving = (benchmark.make_step(name, codebook)(latents, upstream) for name in names)
    assert [gradient.shape for gradient in ours] == [latents.shape, codebook.shape] and len(moving) == 1
    benchmark.check_equal(ours, theirs)
    with pytest.raises(AssertionError):
        benchmark.check_equal([ours[0], 1.001 * ours[1]], theirs)


def test_samples_are_compared_without_test_people(index):
    asked = generation.without_test(index)
    halves = [set(part.subject) for part in (asked.test, asked.validate)]
    assert all(halves) and not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(index.validate.subject) and not halves[0] & set(index.test.subject)


@pytest.fixture
def no_measuring(monkeypatch):
    """Rates that need no machine: 50 items a second at a width of 128 pixels or codes, more for less, or so."""

    def rate(config, *_):
        side = config.image_size if isinstance(config, ovq.VQVAEConfig) else 4 * config.grid_shape[0]
        slower = {"deep_residual": 10, "fine128": 2}.get(config.recipe, 1)
        return lambda: 50 * (128 / side) ** 2 / slower

    monkeypatch.setattr(reproduce, "images_rate", rate)
    monkeypatch.setattr(reproduce, "grids_rate", rate)


def a_row(name, score, accuracy=None, ceiling=0.5):
    """What a row's file holds."""
    scores = {"ssim": 0.9, "brain_ssim": score, "brain_psnr": 20.0, "bits_per_image": 1000.0, "codebook_usage": 0.5}
    scores["perplexity"] = 2.0
    baselines = {"black": {"ssim": 0.7, "brain_ssim": 0.0}, "mean_slice": {"ssim": 0.8, "brain_ssim": 0.4}}
    training = {"seconds": 300.0, "epochs": 2, "weights": 1234}
    row = {"name": name, "trainings": dict.fromkeys(("vqvae", "under_prior", "prior"), training)}
    row["reconstruction"] = {**scores, "baselines": baselines, "intervals": {"brain_ssim": [0.1, None]}}
    if accuracy is not None:
        part = {"classifier_accuracy": 0.97, "coverage": 0.2, "frechet_distance": 20.0}
        row["samples"] = {"classifier_accuracy": accuracy, "coverage": None, "frechet_distance": 100 * accuracy}
        row["samples"] |= {"floor": part, "ceiling": part | {"classifier_accuracy": ceiling, "coverage": 0.9}}
        bits = {"bits_per_code": 2.0, "bits_per_image": 512.0, "validate_accuracy": 0.4, "accuracy": 0.5}
        row |= {"prior": {**bits, "baselines": {"per_position": 4.0}}, "sampling_seconds": 0.5}
    return row


class TestReproduction:
    def test_every_network_gets_the_whole_time(self, index, no_measuring):
        chosen = reproduce.systems(128)
        plan = reproduce.make_plan(chosen, index, 0.05, "here")
        published = {name for name, system in chosen.items() if system.reported}
        names = {"bce_search", "batchnorm_tanh", "adni_compact", "deep_residual", "streaming_small"}
        assert published == names and set(plan["systems"]) == set(chosen)
        for name, parts in plan["systems"].items():
            assert set(parts) == set(chosen[name].parts(index))
            for part, training in parts.items():
                most = chosen[name].parts(index)[part].epochs
                whole, people = 0.05 * 60 * reproduce.SHARE, training["people"]
                if chosen[name].within:
                    whole = plan["systems"][chosen[name].within][part]["seconds"]
                assert training["seconds"] <= 1.001 * whole
                one_more = training["seconds"] * (people + 1) / people
                assert training["config"]["epochs"] == most or one_more >= 0.999 * whole
        under = plan["systems"]["bce_search"]["under_prior"]["config"]
        assert (under["image_size"], plan["systems"]["bce_search"]["prior"]["config"]["grid_shape"]) == (64, [64, 64])
        one, other = (plan["systems"][name]["vqvae"] for name in ("bce_search", "bce_search, squared error"))
        assert one["config"]["loss"] == "bce" and other["config"]["loss"] == "mse"
        assert all(one[name] == other[name] for name in ("people", "rate", "seconds"))
        assert reproduce.twin("streaming_small", plan) == "adni_compact"
        assert reproduce.twin("ours, 8x", plan) is None

    @pytest.mark.parametrize("minutes", [0.05, 0.13, 1.0])
    def test_one_of_ours_is_held_against_a_system_that_ends_early(self, index, no_measuring, minutes):
        chosen = reproduce.systems(64, profile="quick")
        plan = reproduce.make_plan(chosen, index, minutes, "here")
        found = {name: a_row(name, 0.5, 0.9) for name in ("batchnorm_tanh", "ours, 4x, 64 codes")}
        assert "is NOT beaten by 'ours, 4x, 64 codes'" in reproduce.answer("batchnorm_tanh", found, chosen, plan)

    def test_a_plan_of_something_else_is_refused(self, index, no_measuring):
        chosen = reproduce.systems(128)
        plan = json.loads(json.dumps(reproduce.make_plan(chosen, index, 1.0, "here")))
        assert reproduce.disagreement(plan, chosen, index, 1.0) == ""
        assert reproduce.disagreement(plan, chosen, index, 2.0) == "minutes"
        assert reproduce.disagreement({**plan, "splits": {}}, chosen, index, 1.0) == "splits"
        plan["systems"]["ours, 8x"]["prior"]["config"]["num_channels"] = 7
        assert reproduce.disagreement(plan, chosen, index, 1.0) == "ours, 8x, prior"
        alone = reproduce.systems(128, with_priors=False)
        assert reproduce.disagreement(plan, alone, index, 1.0) == "bce_search"

    def test_table_says_what_was_found_and_what_loses(self, tmp_path, index, no_measuring, monkeypatch):
        monkeypatch.setattr(reproduce, "MODELS", tmp_path / "models")
        chosen = reproduce.systems(64)
        plan, out = reproduce.make_plan(chosen, index, 0.05, "here"), tmp_path / "table"
        out.mkdir()
        for name, score, accuracy in (
            ("batchnorm_tanh", 0.3, 1.0),
            ("adni_compact", 0.6, 0.99),
            ("ours, 8x", 0.5, 0.8),
        ):
            row = reproduce.Row(out, name)
            row.add(**a_row(name, score, accuracy))
            iio.imwrite(row.strip, np.full((64, 9 * 64), 99, np.uint8))
        reproduce.Row(out, "bce_search").add(name="bce_search")  # begun
        reproduce.summarise(out, chosen, plan, index.train.num_subjects)
        text, tex = ((tmp_path / f"table.{suffix}").read_text() for suffix in ("md", "tex"))
        for said in (
            "mean slice: ssim 0.800, brain_ssim 0.400",
            "batchnorm_tanh: does NOT beat the mean slice (2 of 15 epochs, 50% of its codes in use); ",
            "'ours, 4x, 64 codes', which is to be held against it, is not trained yet", "0.300 (0.100--)",
            "| 1,000, 256 |", "| 0.80 (0.50, 0.97) | - (0.90, 0.20) | 80 (20, 20) | 0.5 s |",
        ):  # fmt: skip
            assert said in text, said
        assert "bce_search" not in text and r"batchnorm\_tanh" in tex and r"\item" in tex and " brain_ssim" not in tex
        assert (tmp_path / "table.pdf").stat().st_size > 1000

        reproduce.Row(out, "ours, 4x, 64 codes").add(**a_row("ours, 4x, 64 codes", 0.7, 0.9, ceiling=0.7))
        iio.imwrite(reproduce.Row(out, "ours, 4x, 64 codes").strip, np.full((64, 9 * 64), 99, np.uint8))
        reproduce.summarise(out, chosen, plan, index.train.num_subjects)
        text = (tmp_path / "table.md").read_text()
        assert (
            "adni_compact: beats the baselines; is beaten by 'ours, 4x, 64 codes' (0.700 with 1,000 bits); its" in text
        )
        assert (
            "samples are NOT beaten by those of 'ours, 4x, 64 codes': Fréchet distance 99, of ours 90; coverage" in text
        )
        assert "coverage 0.00 and 0.00; told" in text
        assert "told with 0.99 and 0.90, of which one is void." in text
        reproduce.Row(out, "batchnorm_tanh").add(**a_row("batchnorm_tanh", 0.3, 0.5))
        reproduce.summarise(out, chosen, plan, index.train.num_subjects)
        text = (tmp_path / "table.md").read_text()
        assert "(0.700 with 1,000 bits); its samples are not judged: they are held against" in text
        better, worse = ({**a_row("a", 0.5, accuracy)["samples"], "coverage": 1 - accuracy} for accuracy in (0.6, 0.9))
        alone = {"bce_search": a_row("bce_search", 0.6, 0.9), "ours, 2x": a_row("ours, 2x", 0.7)}
        said = reproduce.answer("bce_search", alone, chosen, plan)  # of ours at 2x there is no prior
        assert "is beaten by 'ours, 2x'" in said and "; 'ours, 4x, 64 codes', which is to be held against" in said
        said = reproduce.samples_answer(worse, better, "ours")
        assert "are beaten by those of 'ours': Fréchet distance 90, of ours 60; coverage 0.10" in said
        assert "NOT beaten" in reproduce.samples_answer(better, worse, "ours")

    def test_a_training_that_fails_leaves_the_others_their_turn(self, tmp_path, index, no_measuring, monkeypatch):
        monkeypatch.setattr(reproduce, "MODELS", tmp_path / "models")
        filled, words = [], ["--data", str(index.train.root), "--minutes", "0.05", "--without-priors"]

        def fill(row, *_):
            filled.append(row.name)
            row.values = {}
            row.add(name=row.name)
            if row.name == "deep_residual":
                raise FloatingPointError("the loss is not a number in epoch 3")
            row.add(**a_row(row.name, 0.6))
            iio.imwrite(row.strip, np.full((128, 6 * 128), 99, np.uint8))

        monkeypatch.setattr(reproduce, "fill_reconstruction", fill)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words, "--out", str(tmp_path / "table")])
        reproduce.main()
        assert "deep_residual" in filled and "ours, 2x" in filled
        assert "deep_residual: a training came to nothing. the loss is not" in (tmp_path / "table.md").read_text()
        filled.clear()
        reproduce.main()
        assert not filled

    def test_the_table_of_other_data_is_left_alone(self, tmp_path, index, no_measuring, monkeypatch, capsys):
        monkeypatch.setattr(reproduce, "ROOT", tmp_path)
        monkeypatch.setenv("OASIS_VQ_FIGURES", str(tmp_path / "mine"))
        chosen, committed = reproduce.systems(128), tmp_path / "figures" / "reproduction"
        assert reproduce.default_out(chosen, index, 1.0, quick=False) == committed
        committed.mkdir(parents=True)
        (committed / "plan.json").write_text(json.dumps(reproduce.make_plan(chosen, index, 1.0, "here")))
        assert reproduce.default_out(chosen, index, 1.0, quick=False) == committed
        other = reproduce.default_out(chosen, index, 2.0, quick=False)
        assert other == tmp_path / "mine" / f"reproduction_{index.train.root.name}"
        assert "is of something else (minutes)" in capsys.readouterr().out

    def test_slices_shown_are_of_three_people_and_rise(self, index):
        shown = reproduce.three_slices(index)
        assert len(set(shown.subject)) == min(3, index.test.num_subjects)
        assert (np.diff(shown.slice) >= 0).all() and set(shown.subject) <= set(index.test.subject)

    @pytest.mark.slow
    def test_rows_come_and_stay(self, tmp_path, cohort, monkeypatch, capsys):
        """The whole way for three systems on a few slices; a second call trains nothing, other minutes are refused."""
        monkeypatch.setattr(reproduce, "MODELS", tmp_path / "models")
        words = ["reproduce.py", "--data", str(cohort), "--profile", "quick", "--minutes", "0.02"]
        for name in ("adni_compact", "streaming_small", "ours, 8x"):
            words += ["--only", name]
        words += ["--out", str(tmp_path / "table")]
        monkeypatch.setattr(sys, "argv", words)
        reproduce.main()
        rows = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "table").glob("[aso]*.json")}
        assert set(rows) == {"adni_compact", "streaming_small", "ours_8x"}
        assert {**rows["adni_compact"], "name": "streaming_small"} == rows["streaming_small"]
        assert {file.suffix for file in tmp_path.glob("table.*")} == {".md", ".tex", ".pdf", ".png"}
        assert (tmp_path / "table_rate_distortion.pdf").stat().st_size > 1000
        assert "streaming_small: here the same as adni_compact." in (tmp_path / "table.md").read_text()
        picture = iio.imread(tmp_path / "table" / "ours_8x.png")
        assert picture.shape == (64, 9 * 64) and picture[:, : 3 * 64].std() > 20
        assert len(list((tmp_path / "models").rglob("model.keras"))) == 4
        shutil.rmtree(tmp_path / "models")  # not needed any more
        for function in ("fill_reconstruction", "fill_prior"):
            monkeypatch.setattr(reproduce, function, None)
        reproduce.main()
        monkeypatch.setattr(sys, "argv", [*words, "--minutes", "1"])
        with pytest.raises(SystemExit):
            reproduce.main()
        assert "plan.json is of something else (minutes)" in capsys.readouterr().err
