"""What a host's run has left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import load_adapter
from moelora_plugin.model import moelora_layers
from moelora_plugin.presets import PRESETS

# LLaMA-Factory's chats leave daemon threads running when they end, which on a busy machine now and
# then aborts the interpreter after everything has been answered.
ENDS_OF_A_CHAT = (0, -signal.SIGABRT)


# Presets that go far from the defaults, each with some options changed: what every host must take.
# Numbers as text are what YAML 1.1 makes of 1e-3.
FAMILY: dict[str, dict] = {
    "mixlora": {
        "num_experts": 4,
        "aux_losses": {"z": "1e-3"},
        "router_modifiers": {"jitter": 0.01},
        "router_score_kwargs": {"std": 0.1},
    },
    "goat": {
        "num_experts": 4,
        "init_kwargs": {"rho": "5e+0"},
        "router_kwargs": {"renormalize": False},
        "universal_expert": "one",
    },
}
FAMILY_RANK = 8


def last_checkpoint(output_dir: Path) -> Path:
    """The newest `checkpoint-N`."""
    return max(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))


def losses(output_dir: Path, key: str = "loss") -> list[float]:
    """One value per logged step, from the Trainer's own state file."""
    state = output_dir / "trainer_state.json"
    if not state.exists():
        state = last_checkpoint(output_dir) / "trainer_state.json"
    return [entry[key] for entry in json.loads(state.read_text())["log_history"] if key in entry]


def adapter_config(folder: Path) -> dict:
    """What `adapter_config.json` says."""
    return json.loads((folder / "adapter_config.json").read_text())


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The saved adapter."""
    return load_file(folder / "adapter_model.safetensors")


def assert_trained_adapter(folder: Path, gate_rescale: str, modules: int) -> None:
    """A whole MoE-LoRA adapter whose every B has moved from zero."""
    config, tensors = adapter_config(folder), adapter_tensors(folder)
    assert config["peft_type"] == "MOELORA"
    assert config["gate_rescale"] == gate_rescale
    for part in ("moelora_A.weight", "moelora_B.weight", "moelora_gate.weight"):
        found = [name for name in tensors if name.endswith(part)]
        assert len(found) == modules, (part, found)
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() > 0, name


def family_values(preset: str) -> dict:
    """`FAMILY` with numbers as numbers."""
    return {
        key: {k: float(v) if isinstance(v, str) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in FAMILY[preset].items()
    }


def assert_trained_preset(folder: Path, preset: str, logged_aux: set[str]) -> None:
    """A whole adapter as `FAMILY` describes it, whose every B has moved, with its losses logged."""
    changes = family_values(preset)
    expected = MoeLoraConfig.from_preset(preset, r=FAMILY_RANK, **changes)
    config = adapter_config(folder)
    for key in ("r", "top_k", "site", "init", "scale", "total_rank", *PRESETS[preset].overrides):
        if key != "target_modules":  # a host may have put the modules' names there
            assert config[key] == getattr(expected, key), key
    for key in changes:
        assert config[key] == getattr(expected, key), key
    assert logged_aux == {f"aux_{name}" for name in expected.aux_losses}
    for name, tensor in adapter_tensors(folder).items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() > 0 or name.endswith("bias"), name


def assert_same_tensors(found: Path, expected: Path, *, rtol: float = 0.0) -> None:
    """Two saved adapters are equal, bitwise unless a tolerance is given."""
    ours, theirs = adapter_tensors(found), adapter_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=rtol * 1e-2, msg=name)


def reload(adapter_dir: Path, model_dir: Path) -> PeftModel:
    """The adapter on its base by our own loader, unmerged."""
    model, _ = load_adapter(adapter_dir, base=str(model_dir), dtype="float32", device="cpu")
    assert moelora_layers(model)
    assert not any(layer.merged for layer in moelora_layers(model).values())
    return model


def reload_logits(adapter_dir: Path, model_dir: Path) -> torch.Tensor:
    """Logits of a fixed batch."""
    with torch.no_grad():
        return reload(adapter_dir, model_dir)(torch.arange(3, 35).view(2, 16)).logits
