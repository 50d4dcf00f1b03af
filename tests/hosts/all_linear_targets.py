"""Which modules a host's own functions adapt, of some bases, by its word for all linears.

python all_linear_targets.py HOST cases.json answers.json

An answer has the names of the adapted modules, and those of our own "all-linear" on the same base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moelora_plugin import MoeLoraConfig
from moelora_plugin.model import moelora_layers


def llamafactory(model, case):
    """What LLaMA-Factory's loader does with a model."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    model_args, _, _, finetuning_args, _ = get_train_args(case["settings"])
    return init_adapter(model.config, model, model_args, finetuning_args, is_trainable=True)


def axolotl(model, case):
    """What axolotl's loader does with a model."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.loaders.adapter import load_adapter

    Path("tried.yaml").write_text(yaml.safe_dump(case["settings"]))
    return load_adapter(model, load_cfg("tried.yaml"), "moelora")[0]


def ms_swift(model, case):
    """What swift's training does with a model."""
    from swift.arguments import SftArguments
    from swift.pipelines.train.tuner import TunerMixin
    from swift.utils import parse_args

    words = [
        [f"--{key}", *([v] if isinstance(v, str) else v)] for key, v in case["settings"].items()
    ]
    sys.argv = ["sft.py", *(word for group in words for word in group)]
    args, _ = parse_args(SftArguments)
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)
    return TunerMixin.prepare_model(args, model, task_type="causal_lm")


def answer(host, case):
    """One case's."""

    def base():
        return AutoModelForCausalLM.from_pretrained(case["model"])

    try:
        found = moelora_layers(globals()[host](base(), case))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    config = MoeLoraConfig(num_experts=4, top_k=2, target_modules=case["targets"])
    ours = get_peft_model(base(), config)
    return {"found": sorted(found), "ours": sorted(moelora_layers(ours))}


if __name__ == "__main__":
    _host, _cases, _answers = sys.argv[1], *map(Path, sys.argv[2:])
    _found = [answer(_host, case) for case in json.loads(_cases.read_text())]
    _answers.write_text(json.dumps(_found))
