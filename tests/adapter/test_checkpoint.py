"""Adapters on disk: whole or not at all, and only on the base they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig, load_adapter, save_adapter
from moelora_plugin.checkpoint import read_manifest, verify_weights
from moelora_plugin.errors import AdapterError, ConfigError, MissingDependencyError
from moelora_plugin.files import atomic_directory, sha256_of
from moelora_plugin.model import moelora_layers
from moelora_plugin.recognition import base_fingerprint

IDS = torch.arange(3, 27).view(2, 12)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Bases on disk: the right one, a wider one, and one of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("bases")
    for name, model in {
        "right": tiny_llama(hidden=16),
        "wider": tiny_llama(hidden=32),
        "other": tiny_llama(hidden=16, seed=1),
    }.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def adapted(base: Path, name: str = "default", **keys: str) -> PeftModel:
    targets = ["q_proj", "v_proj"]
    config = MoeLoraConfig(r=2, num_experts=3, top_k=2, target_modules=targets, **keys)
    base_model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(base_model, config, adapter_name=name).eval()
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights(name):
            b.normal_(std=0.5)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def pristine(bases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "pristine"
    return save_adapter(adapted(bases / "right"), folder, manifest={"recipe": {"lr": 0.1}})


@pytest.fixture
def saved(pristine, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights by others, with a digest that agrees."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((folder / "moelora.json").read_text())
    manifest["weights_sha256"] = sha256_of(folder / WEIGHTS)
    (folder / "moelora.json").write_text(json.dumps(manifest))


# Saving.


def test_what_is_saved(bases, saved):
    assert sorted(file.name for file in saved.iterdir()) == [
        ".moelora.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "moelora.json",
    ]
    manifest = read_manifest(saved)
    assert manifest["recipe"] == {"lr": 0.1}
    assert manifest["weights_sha256"] == sha256_of(saved / WEIGHTS) == verify_weights(saved)
    assert manifest["base_fingerprint"] == base_fingerprint(adapted(bases / "right"))


@pytest.mark.parametrize("name", ["default", "mine"])
def test_saved_and_loaded_whatever_the_adapter_is_called(name, bases, tmp_path):
    model = adapted(bases / "right", name)
    save_adapter(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert {"adapter_config.json", WEIGHTS, "tokenizer_config.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out" / name).exists()
    loaded, tokenizer = load_adapter(tmp_path / "out", device="cpu")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert (
        tokenizer("The correct answer is A").input_ids
        == tiny_tokenizer()("The correct answer is A").input_ids
    )


class FailingTokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "half").write_text("written")
        raise OSError("No space left on device")


def test_a_failure_in_the_middle_leaves_nothing(bases, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(bases / "right"), tmp_path / "out", tokenizer=FailingTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_overwriting_leaves_the_old_adapter(bases, saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(bases / "right"), saved, tokenizer=FailingTokenizer(), overwrite=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_holds_something_is_refused(bases, saved):
    with pytest.raises(ConfigError) as caught:
        save_adapter(adapted(bases / "right"), saved)
    assert str(caught.value) == (
        f"{saved} already holds something; choose another --out or pass --overwrite."
    )


def test_overwriting_replaces_what_we_wrote(bases, saved):
    names = {file.name for file in saved.iterdir()}
    (saved / "notes.txt").write_text("mine")
    save_adapter(adapted(bases / "right"), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"
    assert {file.name for file in saved.iterdir()} <= names | {"notes.txt"}
    assert "recipe" not in read_manifest(saved)
    assert list(saved.parent.iterdir()) == [saved]


def test_an_empty_folder_is_no_obstacle_and_parents_are_made(bases, tmp_path):
    (tmp_path / "out").mkdir()
    save_adapter(adapted(bases / "right"), tmp_path / "out")
    save_adapter(adapted(bases / "right"), tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / WEIGHTS).is_file()


# Loading what is damaged.


def refusal(folder: Path, **options) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, device="cpu", **options)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights_are_refused(kept, saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:kept])
    assert refusal(saved).startswith(f"{saved / WEIGHTS} is truncated or damaged (")


def test_a_flipped_bit_is_refused(saved):
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-20] ^= 1  # among the values: the header stays sound
    (saved / WEIGHTS).write_bytes(content)
    message = refusal(saved)
    assert message.startswith(f"{saved / WEIGHTS} was changed after it was saved: its sha256 is ")


def test_missing_tensors_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    lost = sorted(tensors)[1]
    rewrite(saved, {key: value for key, value in tensors.items() if key != lost})
    assert refusal(saved) == (
        f"{saved / WEIGHTS} lacks 1 of 12 tensors, the first being {lost}; save or download it "
        "again."
    )


def test_tensors_without_a_place_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    surplus = sorted(tensors)[0].replace("layers.0", "layers.7")
    rewrite(saved, {**tensors, surplus: torch.zeros(6, 16)})
    assert "holds 1 tensors that have no place in the base, the first being" in refusal(saved)


def test_a_file_that_is_not_json_is_refused(saved):
    (saved / "adapter_config.json").write_text('{"peft_type": "MOELORA"')
    assert refusal(saved).startswith(f"{saved / 'adapter_config.json'} is not valid JSON (")
    (saved / "adapter_config.json").write_text("[]")
    assert "holds a list, not an object" in refusal(saved)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_folder_that_is_no_adapter_is_refused(name, saved):
    (saved / name).unlink()
    assert refusal(saved) == f"{saved} holds no {name}; pass the folder of a saved adapter."


def test_a_folder_that_is_not_there_and_no_network_is_one_sentence(tmp_path):
    for missing in (tmp_path / "nowhere", "nobody/nothing"):
        with pytest.raises(MissingDependencyError) as caught:
            load_adapter(missing)
        message = str(caught.value)
        assert message.startswith(
            f"Adapter {str(missing)!r} is not a folder and cannot be had from"
        )
        assert message.endswith("; pass the path of a folder with adapter_config.json.")
        assert "\n" not in message


# Loading on some base.


def test_a_base_that_is_not_there_is_one_sentence(saved, tmp_path):
    for missing in (str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(MissingDependencyError) as caught:
            load_adapter(saved, base=missing, device="cpu")
        assert str(caught.value) == (
            f"Base model {missing!r} is not a folder and cannot be had from the hub; pass the path "
            "of a local copy (model.name in a recipe, --base on the command line)."
        )


def test_a_base_of_another_shape_is_refused(bases, saved):
    wider = str(bases / "wider")
    assert refusal(saved, base=wider).startswith(
        f"The adapter in {saved} does not fit the base {wider!r}: "
    )
    assert refusal(saved, base=wider, allow_base_mismatch=True)


def test_another_base_of_the_same_shape_is_refused_unless_wanted(bases, saved):
    other = str(bases / "other")
    assert refusal(saved, base=other) == (
        f"The weights of {other!r} are not those of the base this adapter was trained on; pass "
        "that "
        "base (--base), or --allow-base-mismatch if you mean it."
    )
    loaded, _ = load_adapter(saved, base=other, device="cpu", allow_base_mismatch=True)
    assert torch.equal(
        logits(loaded), logits(PeftModel.from_pretrained(tiny_llama(hidden=16, seed=1), saved))
    )


def test_another_hub_id_is_refused_before_anything_is_downloaded(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/model"
    (saved / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(saved, base="another/model") == (
        "The adapter was trained on 'some/model', not on 'another/model'; drop --base, or pass "
        "--allow-base-mismatch if you mean it."
    )


def test_a_base_that_has_moved_is_still_the_base(bases, saved, tmp_path):
    moved = shutil.copytree(bases / "right", tmp_path / "moved")
    loaded, _ = load_adapter(saved, base=str(moved), device="cpu")
    assert torch.equal(logits(loaded), logits(adapted(bases / "right")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_base_is_recognised_in_every_dtype(dtype, saved):
    loaded, _ = load_adapter(saved, dtype=dtype, device="cpu")
    base_dtype = getattr(torch, dtype)
    assert loaded.base_model.model.lm_head.weight.dtype == base_dtype
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_trained_on_a_half_precision_copy_loads_on_the_original(dtype, bases, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(bases / "right", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    save_adapter(adapted(tmp_path / "half"), tmp_path / "out")
    load_adapter(tmp_path / "out", base=str(bases / "right"), dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_file_s_numbers_are_loaded_to_the_bit_on_any_base(dtype, saved):
    model, _ = load_adapter(saved, device="cpu", dtype=dtype)
    stored = load_file(saved / WEIGHTS)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("follows", [False, True], ids=["static", "top-k"])
def test_gates_that_ignore_the_input_fold_at_load(follows, bases, tmp_path):
    static = {"router": "softmax", "router_score": "static", "router_input": "none"}
    model = adapted(bases / "right", **({} if follows else static))
    for layer in moelora_layers(model).values():
        for gate in layer.moelora_gate.parameters():
            torch.nn.init.normal_(gate)
    save_adapter(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded, _ = load_adapter(tmp_path / "out", device="cpu", fold=True)
    assert {layer.merged for layer in moelora_layers(loaded).values()} == {not follows}
    # A merged weight is rounded once more, in fp32, on logits up to ten.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-4)
    if not follows:
        loaded.unmerge_adapter()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-4)


def test_an_adapter_that_names_no_base_needs_one(bases, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="names no base model; pass base \\(--base\\)"):
        load_adapter(saved, device="cpu")
    load_adapter(saved, base=str(bases / "right"), device="cpu")


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(
        ConfigError, match=r"^dtype='fp8' must be one of auto, float32, bfloat16, float16\.$"
    ):
        load_adapter(saved, dtype="fp8", device="cpu")


def test_adapters_of_other_methods_and_without_a_manifest_load_too(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases / "right")
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    assert read_manifest(tmp_path) == {}
    loaded, _ = load_adapter(tmp_path, device="cpu")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_quantised_base_has_no_fingerprint(bases):
    model = adapted(bases / "right")
    layer = next(iter(moelora_layers(model).values()))
    layer.base_layer.weight = torch.nn.Parameter(
        torch.zeros(16, 16, dtype=torch.int8), requires_grad=False
    )
    assert base_fingerprint(model) is None
    assert base_fingerprint(torch.nn.Linear(2, 2)) is None


def test_what_is_written_is_as_readable_as_any_other_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "private").touch(mode=0o600)
    assert (tmp_path / "out" / "private").stat().st_mode == plain.stat().st_mode
