"""VQ-VAE and PixelCNN for 2-D brain MRI slices.

Names are imported on first use: `python -m oasis_vq --help` and the processes that draw phantom slices
do not wait for TensorFlow, and `setup()` can quiet its logs.
"""

import importlib

__version__ = "0.3.0"

_EXPORTS = {
    "config": ["Augmentation", "Paths", "PriorConfig", "VQVAEConfig", "profile", "setup"],
    "recipes": ["Recipe", "recipe", "recipe_names"],
    "slices": ["SliceIndex", "Slices", "find_slices"],
    "streams": ["cached_images", "load_images", "make_dataset"],
    "guard": ["check_folder"],
    "volumes": ["SliceGeometry"],
    "ingest": ["prepare"],
    "phantom": ["find_or_make_slices", "make_cohort"],
    "quantizer": ["EMAVectorQuantizer", "VectorQuantizer"],
    "vqvae": ["VQVAE"],
    "causal": ["CausalAttention", "CausalConv2D", "GatedBlock", "MaskedConv2D", "ResidualBlock"],
    "pixelcnn": ["PixelCNN"],
    "sampling": ["sample_codes"],
    "codes": ["Codes", "encode_index", "encode_slices"],
    "folders": ["load_prior", "load_vqvae", "read_history"],
    "callbacks": ["ReconstructionGrid"],
    "devices": ["make_strategy"],
    "training": ["fit_or_load"],
    "search": ["grid_search"],
    "metrics": ["brain_psnr", "brain_ssim", "psnr", "ssim"],
    "evaluation": ["code_scores", "evaluate_prior", "evaluate_reconstruction"],
    "quality": ["evaluate_samples", "histogram_samples", "nearest_slices", "two_sample_accuracy"],
    "reports": ["evaluate_model", "provenance", "report_texts", "save_provenance"],
    "anomaly": ["Surprise", "find_lesions", "plant_lesions"],
    "inspection": ["code_patches", "code_positions", "codebook_map", "neighbour_codes", "swap_codes"],
    "figures": ["save_figure", "save_film"],
    "plots": [
        "plot_candidates",
        "plot_changes",
        "plot_distances",
        "plot_history",
        "plot_maps",
        "plot_pipeline",
        "plot_rate_distortion",
        "plot_reconstructions",
        "plot_scores",
        "plot_scores_by_position",
        "plot_slices",
    ],
    "code_plots": [
        "plot_code_images",
        "plot_code_patches",
        "plot_code_positions",
        "plot_codebook_map",
        "plot_codebook_usage",
    ],
    "diagrams": ["plot_prior", "plot_vqvae"],
    "tables": ["latex_table", "markdown_table", "save_table"],
    "explore": [
        "explore_code_positions",
        "explore_codes",
        "explore_completions",
        "explore_reconstructions",
        "explore_samples",
        "explore_slices",
    ],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'oasis_vq' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"oasis_vq.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
