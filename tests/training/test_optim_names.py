"""`optim="gradamw"` and `optim_args` in transformers' TrainingArguments, as hosts pass them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.training_args import OptimizerNames

import moelora_plugin
from moelora_plugin import MoeLoraConfig, RiemannianAdamW, RiemannianSGD
from moelora_plugin.errors import ConfigError
from moelora_plugin.trainer_callbacks import AuxLossCallback

ROOT = Path(moelora_plugin.__file__).parents[1]
NAMES = ("rsgd", "grsgd", "radamw", "gradamw")


def arguments(tmp_path: Path, **given: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)


def by_dict(args: TrainingArguments) -> TrainingArguments:
    values = {k: args.to_dict()[k] for k in ("output_dir", "use_cpu", "report_to", "optim")}
    return HfArgumentParser(TrainingArguments).parse_dict(values)[0]


def by_command_line(args: TrainingArguments) -> TrainingArguments:
    line = ["--output_dir", args.output_dir, "--use_cpu", "--optim", str(args.optim.value)]
    return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)[0]


def by_training_args_bin(args: TrainingArguments) -> TrainingArguments:
    file = Path(args.output_dir) / "training_args.bin"  # what every Trainer leaves beside its model
    torch.save(args, file)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "roundtrip", [copy.copy, copy.deepcopy, by_dict, by_command_line, by_training_args_bin]
)
def test_a_name_survives(
    tmp_path: Path, name: str, roundtrip: Callable[[TrainingArguments], TrainingArguments]
) -> None:
    args = arguments(tmp_path, optim=name)
    assert args.optim is OptimizerNames(name)
    assert args.optim == name
    assert args.to_dict()["optim"] == name
    assert json.loads(args.to_json_string())["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    assert roundtrip(args).optim is args.optim


def test_other_names_are_transformers_own(tmp_path: Path) -> None:
    assert arguments(tmp_path, optim="adamw_torch").optim is OptimizerNames.ADAMW_TORCH
    with pytest.raises(ValueError, match=r"gradamv.* is not a valid OptimizerNames"):
        arguments(tmp_path, optim="gradamv")


def optimizer(tmp_path: Path, **given: Any) -> torch.optim.Optimizer:
    """The optimizer as the Trainer makes it."""
    config = MoeLoraConfig(r=2, num_experts=3, top_k=1, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config)
    created = Trainer(model=model, args=arguments(tmp_path, **given)).create_optimizer()
    modes = {"rsgd": "none", "radamw": "none", "grsgd": "sqrt", "gradamw": "sqrt"}
    assert model.peft_config["default"].gate_rescale_used == modes[given["optim"]]
    return created


@pytest.mark.parametrize("name", ["radamw", "gradamw"])
def test_adamw_takes_the_arguments_own_keys_and_ours(tmp_path: Path, name: str) -> None:
    built = optimizer(
        tmp_path,
        optim=name,
        learning_rate=2e-4,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        optim_args="gate_lr=3e-6, damping=1e-3, order=gauss_seidel, bias_correction=false,"
        "scale_compensation=true, lora_plus_ratio=4, gate_max_grad_norm=null",
    )
    assert type(built) is RiemannianAdamW
    experts, gates = built.param_groups
    assert len(experts["params"]) == 4
    assert experts["lr"] == 2e-4
    assert experts["weight_decay"] == 0.1
    assert experts["betas"] == (0.8, 0.95)
    assert experts["eps"] == 1e-7
    assert experts["damping"] == 1e-3
    assert experts["order"] == "gauss_seidel"
    assert experts["bias_correction"] is False
    assert experts["scale_compensation"] is True
    assert experts["lora_plus_ratio"] == 4
    assert len(gates["params"]) == 2
    assert gates["lr"] == 3e-6
    assert gates["weight_decay"] == 0
    assert gates["max_grad_norm"] is None


@pytest.mark.parametrize("name", ["rsgd", "grsgd"])
def test_sgd_takes_no_adam_keys(tmp_path: Path, name: str) -> None:
    built = optimizer(tmp_path, optim=name, learning_rate=0.5, adam_epsilon=1e-3)
    assert type(built) is RiemannianSGD
    assert built.param_groups[0]["lr"] == 0.5
    assert "eps" not in built.param_groups[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("dampng=1", r"optim_args has no key 'dampng'; did you mean 'damping'\? valid keys are "),
        ("lr=1", "optim_args: lr is set by learning_rate; remove it."),
        ("betas=1", "optim_args: betas is set by adam_beta1 and adam_beta2; remove it."),
        ("eps=1", "optim_args: eps is set by adam_epsilon; remove it."),
        ("weight_decay=1", "optim_args: weight_decay is set by weight_decay; remove it."),
        ("damping=big", "optim_args: damping='big' must be a number."),
        ("damping=true", "optim_args: damping='true' must be a number."),
        ("damping=null", "optim_args: damping='null' must be a number."),
        ("gate_max_grad_norm=off", "optim_args: gate_max_grad_norm='off' must be a number"),
        ("order=3", "optim_args: order='3' must be a word."),
        ("bias_correction=1", "optim_args: bias_correction='1' must be true or false."),
        ("order=gauss", "order"),
        ("damping=-1", "damping"),
    ],
)
def test_a_mistake_in_optim_args_is_one_sentence(
    tmp_path: Path, options: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer(tmp_path, optim="gradamw", optim_args=options)


def test_a_trainer_has_the_callback_once() -> None:
    assert DEFAULT_CALLBACKS.count(AuxLossCallback) == 1


# What an order of imports must end with.
CHECK = """
import json as _json, sys as _sys
from transformers.training_args import OptimizerNames as _names
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as _handlers
from transformers.trainer import DEFAULT_CALLBACKS as _callbacks
from moelora_plugin import autoload as _autoload
_ours = ("rsgd", "grsgd", "radamw", "gradamw")
print(_json.dumps({
    "names": all(name in list(_names) for name in _ours),
    "handlers": all(name in _handlers for name in _ours),
    "callbacks": sum(callback.__name__ == "AuxLossCallback" for callback in _callbacks),
    "failures": _autoload.failures,
}), flush=True)
"""
ENDS_WITH = {"names": True, "handlers": True, "callbacks": 1, "failures": {}}

# Forks a child for each case; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps an installed moelora out of the
# parent, which has imported nothing that a hook waits for.
WARM = """
import json, os, sys, traceback
import torch, accelerate, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
hooked = ("peft", "transformers.training_args", "transformers.trainer", "moelora_plugin")
assert not [m for m in hooked if m in sys.modules]
cases, check = json.load(sys.stdin)
for name, code in cases.items():
    print(name, flush=True)
    if (child := os.fork()) == 0:
        try:
            exec(compile(code + check, name, "exec"), {"__name__": name})
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
USE = "\nfrom transformers import TrainingArguments\nTrainingArguments('x', optim='gradamw')"
ORDERS = {
    "ours first": f"import moelora_plugin{USE}",
    "the arguments first": "from transformers import TrainingArguments\nimport moelora_plugin",
    "the optimizers first": "import transformers.trainer_optimizer, moelora_plugin",
    "the trainer first": "from transformers import Trainer\nimport moelora_plugin",
    "peft first": f"import peft, moelora_plugin{USE}",
    "ours, the trainer": "import moelora_plugin, transformers.trainer",
    "our factory": "import moelora_plugin.hf_trainer",
    "our callback": "import moelora_plugin.trainer_callbacks",
    "switched off": (
        "import os; os.environ['MOELORA_AUTOLOAD'] = '0'\n"
        "import moelora_plugin, transformers.trainer\n"
        "from transformers.training_args import OptimizerNames\n"
        "assert 'gradamw' not in list(OptimizerNames)\n"
        f"from moelora_plugin import MoeLoraConfig{USE}"
    ),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WARM],
        input=json.dumps([ORDERS, CHECK]),
        env=environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        cwd=tmp_path_factory.mktemp("warm"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {name: json.loads(end) for name, end in zip(lines[::2], lines[1::2], strict=True)}


def environment(**overrides: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k != "MOELORA_AUTOLOAD"}
    ours = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return {**clean, **ours, **overrides}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports_ends_registered(endings: dict[str, Any], order: str) -> None:
    assert endings[order] == ENDS_WITH


@pytest.mark.parametrize("first", ["import peft", ""])
def test_the_entry_point_serves_a_script_that_never_names_us(tmp_path: Path, first: str) -> None:
    """Without a first line, torch is first imported by transformers' own training_args."""
    folder = tmp_path / "moelora-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moelora\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[torch.backends]\nmoelora = moelora_plugin.autoload:install\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", first + USE + CHECK],
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)])),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ENDS_WITH
