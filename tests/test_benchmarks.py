"""The benchmark of the quantizers times the same thing, and the table of reproductions says what was found."""

import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
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


class TestReproduction:
    def test_every_published_system_has_a_row_and_one_of_ours_takes_no_more_bits(self):
        chosen = reproduce.systems(128)
        published = [system for system in chosen.values() if system.reported]
        ours = [system.vqvae.bits_per_image for name, system in chosen.items() if name.startswith("ours")]
        assert {system.name for system in published} == {
            "bce_search", "batchnorm_tanh", "adni_compact", "deep_residual", "streaming_small",
        }  # fmt: skip
        assert all(min(ours) <= system.vqvae.bits_per_image for system in published)
        assert chosen["bce_search"].under_prior.grid_shape == (64, 64)
        assert chosen["deep_residual"].under_prior is chosen["deep_residual"].vqvae

    def test_slices_shown_are_of_three_people_and_rise(self, index):
        shown = reproduce.three_slices(index)
        assert len(set(shown.subject)) == min(3, index.test.num_subjects)
        assert (np.diff(shown.slice) >= 0).all() and set(shown.subject) <= set(index.test.subject)

    def test_verdicts_say_what_loses(self):
        def row(name, reported, score, bits):
            baselines = {"black": {"brain_ssim": 0.0}, "mean_slice": {"brain_ssim": 0.4}}
            report = {"brain_ssim": score, "bits_per_image": bits, "baselines": baselines}
            return {"name": name, "reported": reported, "reconstruction": report}

        rows = [row("theirs", "SSIM 0.9", 0.6, 9000), row("weak", "SSIM 0.8", 0.3, 500), row("ours, 4x", "", 0.5, 1000)]
        assert reproduce.verdicts(rows) == [
            "theirs: beats the baselines; is NOT beaten by 'ours, 4x' (0.500 with 1,000 bits).",
            "weak: does NOT beat the mean slice; none of ours takes as few bits.",
            "ours, 4x: beats the baselines.",
        ]

    @pytest.mark.slow
    def test_rows_come_and_stay(self, tmp_path, cohort, monkeypatch, capsys):
        """The whole way for one system on a few slices; a second call trains nothing, other minutes are refused."""
        monkeypatch.setattr(reproduce, "MODELS", tmp_path / "models")
        words = ["reproduce.py", "--data", str(cohort), "--profile", "quick", "--minutes", "0.02"]
        words += ["--only", "streaming_small", "--out", str(tmp_path / "table")]
        monkeypatch.setattr(sys, "argv", words)
        reproduce.main()
        row = json.loads((tmp_path / "table" / "streaming_small.json").read_text())
        assert {"reconstruction", "prior", "samples", "sampling_seconds"} <= set(row)
        assert {file.suffix for file in tmp_path.glob("table.*")} == {".md", ".tex", ".pdf", ".png"}
        assert "streaming_small" in (tmp_path / "table.md").read_text()
        picture = iio.imread(tmp_path / "table" / "streaming_small.png")
        assert picture.shape == (64, 9 * 64) and picture[:, : 3 * 64].std() > 20
        trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "models").rglob("model.keras")}
        reproduce.main()
        assert len(trained) == 2 and all(file.stat().st_mtime_ns == time for file, time in trained.items())
        monkeypatch.setattr(sys, "argv", [*words, "--minutes", "1"])
        with pytest.raises(SystemExit):
            reproduce.main()
        assert "streaming_small.json is of other data, another time" in capsys.readouterr().err
