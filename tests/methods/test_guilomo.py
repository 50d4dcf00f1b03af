"""GuiLoMo's search: its masks, what it finds where the answer is known, and its way to training."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import TASKS
from moelora_plugin import MoeLoraConfig
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.search import search_guilomo
from moelora_plugin.search.guilomo import selection_mask

WIDTH = 16


def test_a_mask_keeps_the_first_n_and_has_the_soft_mask_s_gradient():
    selection = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.1, 0.1]], dtype=torch.float64)
    selection.requires_grad_()
    mask = selection_mask(selection)
    rest = 1e-4
    expected = torch.tensor([[1, 1, rest], [1, rest, rest]], dtype=torch.float64)
    torch.testing.assert_close(mask, expected)
    assert selection_mask(selection, least=2)[1].tolist() == pytest.approx([1, 1, rest])

    # Entry l is kept where the number chosen is more than l: sums of a softmax from the right.
    (gradient,) = torch.autograd.grad(mask[0, 1], selection)
    twin = selection.detach().clone().requires_grad_()
    shares = twin[0].softmax(0)
    (expected_gradient,) = torch.autograd.grad(shares[1] + shares[2], twin)
    torch.testing.assert_close(gradient, expected_gradient)
    # A larger entry further right keeps more: the gradient rises from left to right.
    assert gradient[0, 0] < 0 < gradient[0, 1]


class TwoJobs(nn.Module):
    """Two linears side by side: one has to change everywhere, the other nowhere."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(to_dict=dict)
        self.busy = nn.Linear(WIDTH, WIDTH, bias=False)
        self.idle = nn.Linear(WIDTH, WIDTH, bias=False)
        self.device = torch.device("cpu")

    def forward(self, x, busy, idle):
        errors = (self.busy(x) - busy, self.idle(x) - idle)
        return SimpleNamespace(loss=sum(error.square().mean() for error in errors))


def batches(model, change, seed, number=16):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        x = torch.randn(32, WIDTH, generator=generator)
        noise = 0.1 * torch.randn(2, 32, WIDTH, generator=generator)
        with torch.no_grad():
            busy, idle = model.busy(x) + x @ change.T + noise[0], model.idle(x) + noise[1]
        found.append({"x": x, "busy": busy, "idle": idle})
    return found


def config_for(**keys) -> MoeLoraConfig:
    defaults = {"num_experts": 4, "top_k": 2, "r": 6, "lora_alpha": 6, "lora_dropout": 0.0}
    return MoeLoraConfig(**{**defaults, "target_modules": ["busy", "idle"], **keys})


def toy(seed=0):
    torch.manual_seed(seed)
    model = TwoJobs()
    change = torch.randn(WIDTH, WIDTH) / 4
    return model, batches(model, change, 1), batches(model, change, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_module_that_needs_rank_gets_it_and_its_allocation_trains(seed):
    model, train, validation = toy(seed)
    result = search_guilomo(
        model, config_for(), train, validation, steps=150, lr=1e-2, selection_lr=0.05
    )
    assert set(result.modules) == {"busy", "idle"}
    busy, idle = (sum(result.modules[name]["ranks"]) for name in ("busy", "idle"))
    assert busy >= 2 * idle
    assert result.validation_losses[-1] < 0.2 * result.validation_losses[0]
    for entry in result.modules.values():
        assert 2 <= entry["num_experts"] <= 4
        assert len(entry["ranks"]) == entry["num_experts"]
        assert all(1 <= rank <= 6 for rank in entry["ranks"])

    modules = json.loads(json.dumps(result.modules))
    config = config_for(allocation="modules", allocation_kwargs={"modules": modules})
    adapted = get_peft_model(model, config)
    for name, entry in modules.items():
        layer = getattr(model, name)
        assert layer.moelora_mixture["default"].plan.ranks == tuple(entry["ranks"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in train * 5:
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_the_base_comes_back_as_it_was():
    model, train, validation = toy()
    model.idle.weight.requires_grad_(False)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    search_guilomo(model, config_for(), train, validation, steps=2)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert (model.busy.weight.requires_grad, model.idle.weight.requires_grad) == (True, False)
    assert not model.training
    assert not moelora_layers(model)


def test_weights_learn_from_training_batches_and_selections_from_validation_batches():
    """With the other kind's rate next to nothing, each kind of batch moves its own kind alone."""
    found = {}
    for kind, rates in {
        "weights": {"lr": 1e-2, "selection_lr": 1e-30},
        "selections": {"lr": 1e-30, "selection_lr": 0.05},
    }.items():
        results = []
        for poisoned in ("neither", "train", "validation"):
            model, train, validation = toy()
            if poisoned != "neither":
                for batch in train if poisoned == "train" else validation:
                    batch["busy"] = -3 * batch["busy"]
            torch.manual_seed(0)
            result = search_guilomo(model, config_for(), train, validation, steps=3, **rates)
            results.append(result)
        neither, train_poisoned, validation_poisoned = results
        # The other source's losses tell whether what learned from the poisoned one has moved.
        found[kind] = (
            neither.validation_losses != train_poisoned.validation_losses,
            neither.train_losses != validation_poisoned.train_losses,
        )
    assert found == {"weights": (True, False), "selections": (False, True)}


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"num_experts": 1, "top_k": 1}, {}, "num_experts=1 must be at least 2"),
        ({"site": "block"}, {}, "site='block' shares routers"),
        ({}, {"steps": 0}, "steps=0 must be a number above 0"),
        ({}, {"lr": -1.0}, "lr=-1.0 must be a number above 0"),
        ({}, {"train": []}, "train has no batches"),
        ({}, {"train": iter([])}, "train has no batches"),
        ({}, {"lr": 1e30, "steps": 5}, "diverged; lower lr"),
    ],
)
def test_errors_name_the_key_and_leave_the_base_alone(keys, options, message):
    model, train, validation = toy()
    arguments = {"train": train, "validation": validation, "steps": 1, **options}
    with pytest.raises(ConfigError, match=message):
        search_guilomo(model, config_for(**keys), **arguments)
    assert not moelora_layers(model)


@pytest.fixture
def recipe(tmp_path):
    """A tiny base, invented rows, and a recipe over both."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = tmp_path / "data" / TASKS["sst2"].folder
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for split, count in (("train", 12), ("validation", 6)):
        labels = [generator.randrange(2) for _ in range(count)]
        rows = {"sentence": [f"a film, number {i}" for i in range(count)], "label": labels}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": str(tmp_path / "base"), "dtype": "float32"},
        "adapter": {"num_experts": 3, "top_k": 2, "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"tasks": ["sst2"], "data_dir": str(tmp_path / "data")},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"},
        "output_dir": str(tmp_path / "run"),
    }
    content["training"]["use_cpu"] = True
    path.write_text(yaml.safe_dump(content))
    return path


def moelora(*arguments):
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_command_writes_a_file_that_training_takes(recipe, tmp_path):
    out = tmp_path / "alloc.json"
    output = moelora("search", "guilomo", recipe, "--out", out, "--steps", 2)
    modules = json.loads(out.read_text())
    expected = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    assert sorted(modules) == expected
    assert "Allocation in" in output

    moelora(
        "train",
        recipe,
        "adapter.allocation=modules",
        f"adapter.allocation_kwargs={{path: {out}}}",
    )
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["allocation_kwargs"] == {"modules": modules}
    again = CliRunner().invoke(app, ["search", "guilomo", str(recipe), "--out", str(out)])
    assert again.exit_code == 1
    assert "already holds something" in again.output
