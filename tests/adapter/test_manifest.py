"""The files of an adapter: what was changed in them is noticed and named."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig, load_adapter, save_adapter
from moelora_plugin.analysis.summary import inspect_adapter
from moelora_plugin.errors import AdapterError, MoeLoraError
from moelora_plugin.export import export_adapter

IDS = torch.arange(3, 27).view(2, 12)
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "moelora.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make(base: Path, config: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pristine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    keys: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    configs = {
        "MOELORA": MoeLoraConfig(num_experts=3, top_k=2, **keys),
        "LORA": LoraConfig(task_type="CAUSAL_LM", **keys),
    }
    history = {"recipe": {"data": {"tasks": ["sst2"]}}, "steps": 3, "train_loss": 0.5}
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: save_adapter(make(base, config), folder / kind, manifest=history)
        for kind, config in configs.items()
    }


@pytest.fixture(params=["MOELORA", "LORA"])
def saved(request: Any, pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage: of our own type, and of another."""
    return Path(shutil.copytree(pristine[request.param], tmp_path / "saved"))


@pytest.fixture
def own(pristine: dict[str, Path], tmp_path: Path) -> Path:
    """One of our own type."""
    return Path(shutil.copytree(pristine["MOELORA"], tmp_path / "saved"))


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change values; without the configuration's own checksum, which would be the first to tell."""
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        content[key] = value(content.get(key)) if callable(value) else value
    content.pop("checksum", None)
    (folder / file).write_text(json.dumps(content))


def is_ours(folder: Path) -> bool:
    return json.loads((folder / CONFIG).read_text())["peft_type"] == "MOELORA"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(MoeLoraError) as caught:
        load_adapter(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# The configuration.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("lora_alpha", lambda alpha: 2 * alpha),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["v_proj"]),
    ],
)
def test_an_edit_that_changes_the_answers_is_named(key: str, value: Any, saved: Path) -> None:
    before = json.loads((saved / CONFIG).read_text())[key]
    edit(saved, CONFIG, **{key: value})
    now = json.loads((saved / CONFIG).read_text())[key]
    message = refusal(saved)
    assert message == (
        f"{saved / CONFIG} was changed after it was saved: {key} is {now!r}, moelora.json says "
        f"{before!r}; set it back, or, if you mean it, change config.{key} in moelora.json too."
    )
    edit(saved, MANIFEST, config=lambda config: {**config, key: now})
    if "exclude" not in key and "layers" not in key:  # those have fewer tensors
        load_adapter(saved, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", 1), ("router", "softmax"), ("router_kwargs", {"renormalize": False})],
)
def test_so_is_one_of_the_routing(key: str, value: Any, own: Path) -> None:
    edit(own, CONFIG, **{key: value})
    assert f"was changed after it was saved: {key} is " in refusal(own)


def test_every_reader_notices(own: Path, tmp_path: Path) -> None:
    edit(own, CONFIG, top_k=1)
    for read in (
        inspect_adapter,
        lambda folder: export_adapter(folder, tmp_path / "out"),
        lambda folder: export_adapter(folder, tmp_path / "out", to="merged"),
    ):
        with pytest.raises(AdapterError, match=r"top_k is 1, moelora\.json says 2"):
            read(own)
    assert not (tmp_path / "out").exists()


def test_what_may_change_is_let_through(saved: Path, base: Path, tmp_path: Path) -> None:
    expected = logits(load_adapter(saved, device="cpu")[0])
    moved = shutil.copytree(base, tmp_path / "moved")
    edit(
        saved,
        CONFIG,
        base_model_name_or_path=str(moved),
        inference_mode=False,
        peft_version="9.9.9",
        lora_dropout=0.1,
        target_modules=["v_proj", "q_proj"],  # PEFT writes sets in any order
    )
    content = json.loads((saved / CONFIG).read_text())
    content.pop("use_rslora", None)  # its default
    (saved / CONFIG).write_text(json.dumps(dict(reversed(content.items()))))
    assert torch.equal(logits(load_adapter(saved, device="cpu")[0]), expected)


def test_saving_again_with_peft_beside_the_manifest_is_no_change(saved: Path) -> None:
    model = load_adapter(saved, device="cpu")[0]
    model.save_pretrained(str(saved))
    assert torch.equal(logits(load_adapter(saved, device="cpu")[0]), logits(model))


def test_manifests_of_older_releases_load(saved: Path) -> None:
    expected = logits(load_adapter(saved, device="cpu")[0])
    content = json.loads((saved / MANIFEST).read_text())
    for key in ("config", "base_embeddings", "base_quantization"):
        del content[key]
    (saved / MANIFEST).write_text(json.dumps(content))
    assert torch.equal(logits(load_adapter(saved, device="cpu")[0]), expected)
    (saved / MANIFEST).unlink()
    assert torch.equal(logits(load_adapter(saved, device="cpu")[0]), expected)


# The manifest.

WRONG = [[], {}, "text", 7, -1.5, True, float("nan"), [None], ["a"], [1e999], {"samples": 3}]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "put",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to(path),
    ],
    ids=["folder", "pipe", "link to nothing", "circle"],
)
def test_what_cannot_be_read_is_not_taken_for_no_manifest(put: Any, saved: Path) -> None:
    file = saved / "moelora.json"
    file.unlink()
    put(file)
    assert str(file) in refusal(saved)


@pytest.mark.parametrize("key", ["weights_sha256", "config", "base_fingerprint", "base_embeddings"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_an_entry_of_a_wrong_type_is_a_sentence(key: str, value: Any, saved: Path) -> None:
    if (key, value) == ("config", {}):
        value = {"r": None}
    edit(saved, MANIFEST, **{key: value})
    message = refusal(saved)
    assert key in message or "was changed after it was saved" in message


@pytest.mark.parametrize("path", ["base_fingerprint", "base_embeddings"])
@pytest.mark.parametrize("samples", [["a"] * 16, [float("nan")] * 16, [10**400] * 16, [None], {}])
def test_samples_that_are_no_numbers_are_a_sentence(path: str, samples: Any, saved: Path) -> None:
    edit(
        saved,
        MANIFEST,
        **{path: {"samples": samples, "shape": [1], "shapes_sha256": "", "modules": 1}},
    )
    assert f"{path} must be a fingerprint with" in refusal(saved)


def test_samples_of_another_number_are_another_base(own: Path) -> None:
    def shorter(fingerprint: dict[str, Any]) -> dict[str, Any]:
        return {**fingerprint, "samples": fingerprint["samples"][:3]}

    edit(own, MANIFEST, base_fingerprint=shorter)
    assert "are not those of the base this adapter was trained on" in refusal(own)


@pytest.mark.parametrize("file", [CONFIG, MANIFEST])
@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"x"', DEEP, '{"a": ' + DEEP + "}", "\x00"]
)
def test_files_that_are_no_object_are_a_sentence(file: str, text: str, saved: Path) -> None:
    (saved / file).write_text(text)
    message = refusal(saved)
    assert message.startswith(f"{saved / file} ")
    said = ("is not valid JSON", "not an object", "is nested too deeply")
    assert any(part in message for part in said)


@pytest.mark.parametrize(
    "history",
    [
        {"recipe": "mine"},
        {"recipe": []},
        {"recipe": {"data": ["sst2"]}},
        {"recipe": {"data": {"tasks": "sst2"}}},
        {"recipe": {"data": {"tasks": [1]}, "optimizer": []}},
        {"recipe": {"optimizer": {"name": 1, "lr": "x"}}},
        {"data": "alpaca"},
        {"data": [1]},
        {"routing": []},
        {"routing": {"layer": {"load": [], "entropy": 0.1}}},
        {"routing": {"layer": {"load": ["a"], "entropy": float("inf")}}},
        {"steps": "many", "train_loss": [], "trainable_parameters": None},
        {"recipe": None, "routing": None},
    ],
    ids=repr,
)
def test_a_history_of_another_form_is_left_out_and_named(
    history: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    """Callers of `save_adapter` may note what they like, so it is no reason not to load."""
    edit(saved, MANIFEST, **history)
    load_adapter(saved, device="cpu")
    if is_ours(saved):
        from rich.console import Console

        console = Console(width=300, record=True)
        console.print(inspect_adapter(saved).table())
        is_wrong = any(value is not None for value in history.values())
        assert ("not understood" in console.export_text()) == is_wrong
        export_adapter(saved, tmp_path / "out")


# The weights.


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_are_none_are_named(value: float, dtype: torch.dtype, saved: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(saved / WEIGHTS).items()}
    name = sorted(tensors)[-2]
    tensors[name].view(-1)[-1] = value
    rewrite(saved, tensors)
    message = refusal(saved)
    assert name.removesuffix(".weight") in message  # behind it our own type names the adapter
    assert "NaN or infinite" in message
    if is_ours(saved):  # in every loader
        with pytest.raises(AdapterError, match="NaN or infinite"):
            PeftModel.from_pretrained(tiny_llama(hidden=16), saved)


def test_large_numbers_are_numbers(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    for tensor in tensors.values():
        tensor.fill_(3e38)  # whose sum overflows
    rewrite(saved, tensors)
    load_adapter(saved, device="cpu")


@pytest.mark.parametrize(
    "sizes", [{"num_experts": 4096}, {"r": 20_000}, {"r": 3}, {"num_experts": 2}], ids=repr
)
def test_other_sizes_than_the_file_s_are_refused_before_they_are_made(
    sizes: dict[str, int], own: Path
) -> None:
    (own / MANIFEST).unlink()
    edit(own, CONFIG, **sizes)
    began = time.perf_counter()
    message = refusal(own, dtype="bfloat16")
    # To make them takes minutes and more memory than there is; to compare, milliseconds.
    assert time.perf_counter() - began < 20
    ranks = sizes.get("num_experts", 3) * sizes.get("r", 2)
    assert f"moelora_A.weight is (6, 16) in the file and would be ({ranks}, 16)" in message


def test_a_header_that_claims_more_than_there_is(saved: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.moelora_A.weight"
    claim = {name: {"dtype": "F32", "shape": [10**6, 2500], "data_offsets": [0, 10**10]}}
    header = json.dumps(claim).encode()
    (saved / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    assert f"{saved / WEIGHTS} is truncated or damaged" in refusal(saved)
