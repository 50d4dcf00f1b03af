"""One architecture from end to end: adapt, train, save, load three ways, generate."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_config import tiny_config
from tiny_inputs import batches
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from moelora_plugin import MoeLoraConfig, build_optimizer, checkpoint
from moelora_plugin.analysis import plan
from moelora_plugin.checkpoint import load_adapter, save_adapter
from moelora_plugin.errors import MoeLoraError, first_line
from moelora_plugin.layers import first_step
from moelora_plugin.model import moelora_layers

# What is gone through, and the auto class of each.
TASKS = {
    "causal": "CAUSAL_LM",
    "encoder": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "vision-text": "IMAGE_TEXT_TO_TEXT",
    "vision": "IMAGE_CLASSIFICATION",
}
# Takes a base and a folder.
Loader = Callable[[nn.Module, str], nn.Module]
_LARGEST = 30_000_000  # parameters; what cannot be made smaller is not tiny


@dataclasses.dataclass
class Outcome:
    """What came of one architecture.

    Attributes:
        status: "works"; "as LoRA" (but for a step at which PEFT's LoRA fails alike); "refused" (in
            one sentence); "not tiny" (the base alone cannot be built or called small); "fault".
        detail: why, or of what works what is worth saying.
        linears: adapted.
        left_out: what all-linear does not reach.
        unreached: adapted linears that the step did not reach.
    """

    status: str = "works"
    detail: str = ""
    linears: int = 0
    left_out: str = ""
    unreached: str = ""

    def note(self, text: str) -> None:
        """Say something more of it."""
        self.detail = "; ".join(part for part in (self.detail, text) if part)


class NotTiny(Exception):
    """The base alone fails."""


def architectures() -> list[tuple[str, str]]:
    """(task, model type) of all that the installed transformers has."""
    return [
        (task, model_type)
        for task, name in TASKS.items()
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
    ]


def build(task: str, model_type: str) -> nn.Module:
    """A small random model.

    Raises:
        NotTiny: the base cannot be built so.
    """
    try:
        config = tiny_config(model_type)
        kind = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING")[type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        text = config.get_text_config(decoder=True)
        if not isinstance(config, wanted := kind.config_class or object) and isinstance(
            text, wanted
        ):
            config = text  # the language model of a larger one
        torch.manual_seed(0)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        if parameters > _LARGEST:
            raise NotTiny(f"the smallest that was found has {parameters:,} parameters")
        model = kind(config).eval()
        model.name_or_path = model.config.name_or_path = "tiny"
        return model
    except NotTiny:
        raise
    except Exception as error:
        raise NotTiny(f"not built: {_words(error)}") from error


def check(task: str, model_type: str) -> Outcome:
    """Go through everything that an adapter is for, on one architecture."""
    outcome = Outcome()
    stage = "building"
    try:
        base = build(task, model_type)
        inputs = _callable(base, task, outcome)
        stage = "adapting"
        model = _adapted(copy.deepcopy(base), outcome)
        stage = "training"
        _train(base, model, inputs, outcome)
        stage = "saving"
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder) / "adapter")
            for name, load in LOADERS.items():
                stage = f"loading by {name}"
                error = _trial(load, base, model, str(Path(folder) / "adapter"), inputs)
                if error and _lora_fails(load, base, inputs):
                    outcome.status = "as LoRA"
                    outcome.note(f"{name} does not load it, nor LoRA")
                elif error:
                    raise error
        if task == "causal":
            stage = "planning"
            _plan(base, outcome)
        stage = "generating"
        if hasattr(base, "generate") and base.can_generate():
            _generate(base, model, inputs, outcome)
    except NotTiny as error:
        return Outcome("not tiny", str(error))
    except MoeLoraError as error:
        return dataclasses.replace(outcome, status="refused", detail=str(error))
    except Exception as error:
        if stage in ("adapting", "training") and _lora_fails(None, base, inputs):
            detail = f"{stage} fails, with LoRA as well: {_words(error)}"
            return dataclasses.replace(outcome, status="as LoRA", detail=detail)
        detail = f"{stage}: {_words(error)}"
        return dataclasses.replace(outcome, status="fault", detail=detail)
    return outcome


def _trial(
    load: Loader, base: nn.Module, model: nn.Module, folder: str, inputs: dict[str, Any]
) -> Exception | None:
    """What a loader raises, or that what it loads answers otherwise; None where it does not."""
    try:
        loaded = load(copy.deepcopy(base), folder).eval()
        found, expected = _outputs(loaded, inputs), _outputs(model.eval(), inputs)
        assert len(found) == len(expected), "other outputs"
        assert all(map(torch.equal, found, expected)), "other values"
    except Exception as error:
        return error
    return None


def _lora_fails(load: Loader | None, base: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether PEFT's LoRA, on the same linears, fails at the same."""
    try:
        targets = _adapted(copy.deepcopy(base), Outcome()) if load else None
        names = [name.removeprefix("base_model.model.") for name in moelora_layers(targets or base)]
        config = LoraConfig(target_modules=names or "all-linear", init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(base), config)
        _loss(model.train(), inputs).backward()
    except Exception:
        return True
    if load is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _trial(load, base, model, folder, inputs) is not None


def _callable(base: nn.Module, task: str, outcome: Outcome) -> dict[str, Any]:
    """The first batch that the base alone takes, forwards and backwards."""
    reasons = []
    for note, inputs in batches(base, task):
        try:
            first, second = _outputs(base, inputs), _outputs(base, inputs)
            assert all(map(torch.equal, first, second)), "answers differ from call to call"
            _loss(copy.deepcopy(base).train(), inputs).backward()
        except Exception as error:
            reasons.append(_words(error))
            continue
        outcome.note(note)
        return inputs
    raise NotTiny(f"not called: {reasons[0]}")


def _adapted(base: nn.Module, outcome: Outcome) -> PeftModel:
    config = MoeLoraConfig(
        r=2, num_experts=3, top_k=2, lora_dropout=0.0, target_modules="all-linear"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config)
    for warning in caught:
        _, found, after = str(warning.message).partition(" leaves out, of ")
        if found:
            outcome.left_out = after.partition(": ")[2].rstrip(".")
    torch.manual_seed(2)
    layers = moelora_layers(model)
    for layer in layers.values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.1)  # zero at first, which hides A and the gates
    outcome.linears = len(layers)
    return model


def _train(base: nn.Module, model: PeftModel, inputs: dict[str, Any], outcome: Outcome) -> None:
    optimizer = build_optimizer(model, "gradamw", lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _loss(model.train(), inputs).backward()
    for warning in caught:
        _, found, after = str(warning.message).partition("did not reach ")
        if "running statistics" in str(warning.message):
            outcome.note("training moves running statistics that no adapter holds, with a warning")
            # Here they go back, so that what is loaded can be told from what was saved.
            state = dict(base.named_buffers())
            for name, tensor in model.get_base_model().named_buffers():
                if name in state:
                    tensor.data.copy_(state[name])
        if found:
            outcome.unreached = after.partition("; leave them out")[0]
            outcome.unreached = outcome.unreached.partition(": ")[2]
    silent = {}  # by name, what a linear's parameters got in place of a gradient
    layers = moelora_layers(model)
    for name, layer in layers.items():
        gradients = [p.grad for p in (*layer.tensors().values(), *layer.gate_parameters())]
        missing = [g is None for g in gradients]
        if any(missing):
            silent[name] = "no gradient" if all(missing) else "no gradient in part"
        elif not all(g.isfinite().all() for g in gradients):
            raise AssertionError(f"the gradient of {name} is not finite")
        elif not all(g.count_nonzero() for g in gradients):
            silent[name] = "a gradient of zero"
    dead = _without_gradient(base, inputs) if silent else set()
    alive = {first_step.stem(name, keep=1) for name in layers if name not in silent}
    spared = 0
    for name, what in silent.items():
        inner = name.removeprefix("base_model.model.")
        # Of a list of modules inside a layer, experts for example, some may have no part in a step.
        if what == "no gradient" and first_step.stem(name, keep=1) in alive:
            spared += 1
        # Where nothing arrives in the base alone, nothing can arrive in an adapter.
        elif what == "no gradient":
            assert outcome.unreached, f"{name} has no gradient and is not named"
        else:
            assert inner in dead, f"{name} has {what}"
    still = sum(what == "a gradient of zero" for what in silent.values())
    if still:
        outcome.note(f"{still} linears get a gradient of zero, in the base alone as well")
    if spared:
        outcome.note(f"{spared} of lists of modules had no part in the step")
    if len(silent) == len(layers):
        return
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not all(map(torch.equal, before, after)), "the step moved nothing"
    optimizer.zero_grad()


def _strictly(base: nn.Module, folder: str) -> nn.Module:
    # Tokenizers and processors are no part of this.
    with mock.patch.object(checkpoint, "load_processor"):
        return load_adapter(folder, base=base)[0]


def _without_gradient(base: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """Modules whose weight learns nothing from this batch where the base itself trains."""
    base = copy.deepcopy(base).train().requires_grad_(True)
    _loss(base, inputs).backward()
    found = set()
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and (
            weight.grad is None or not weight.grad.count_nonzero()
        ):
            found.add(name)
    return found


def _native(base: nn.Module, folder: str) -> nn.Module:
    base.load_adapter(folder)
    return base


LOADERS: dict[str, Loader] = {
    "moelora's load_adapter": _strictly,
    "PeftModel": PeftModel.from_pretrained,
    "the model's own load_adapter": _native,
}


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    names = inspect.signature(inner.forward).parameters
    return model(**inputs, **({"use_cache": False} if "use_cache" in names else {}))


def _tensors(output: Any) -> list[Tensor]:
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else output
    return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return _tensors(_call(model, inputs))


def _loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    return sum(t.float().square().mean() for t in _tensors(_call(model, inputs)))


def _plan(base: nn.Module, outcome: Outcome) -> None:
    config = MoeLoraConfig(r=2, num_experts=3, top_k=2, target_modules="all-linear")
    with mock.patch.object(plan, "load_config", return_value=base.config):
        try:
            planned = plan.plan_adapter("tiny", config, plan.Step(batch=2, length=8))
        except MoeLoraError as error:
            outcome.note(f"plan refuses: {error}")
            return
    assert planned.modules, "nothing is planned"
    if planned.ours.step is None:
        outcome.note("plan: what a step takes depends on the data")


def _generate(base: nn.Module, model: nn.Module, inputs: dict[str, Any], outcome: Outcome) -> None:
    given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    try:
        base.generate(**given, **options)
    except Exception as error:
        outcome.note(f"the base alone does not generate from this batch ({_words(error)})")
        return
    torch.manual_seed(3)
    first = model.generate(**given, **options)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(**given, **options)), "answers differ"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:160]
