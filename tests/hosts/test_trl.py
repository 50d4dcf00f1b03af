"""What TRL does and a plain Trainer does not; test_trainer.py has what they share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from host_runs import (
    FAMILY,
    FAMILY_RANK,
    adapter_config,
    adapter_tensors,
    assert_trained_adapter,
    assert_trained_preset,
    family_values,
    losses,
    reload,
)
from transformers import AutoTokenizer

from moelora_plugin.integrations.init import write_config

SCRIPT = Path(__file__).parent / "trainer_runs.py"
GRADAMW = {"optim": "gradamw", "optim_args": "gate_lr=1e-3,damping=1e-4"}
NO_DROPOUT = {"lora_dropout": 0.0}
AUX = {**NO_DROPOUT, "aux_losses": {"switch_lb": 0.3, "z": 0.02}}
STANDING_STILL = {"optim": "rsgd", "learning_rate": 0.0, "max_steps": 1}
BETA = 0.5
LN_2 = math.log(2)
SHORT = {**GRADAMW, "max_steps": 2}
# Presets with tensors that never train (factors, counts of a modifier, an offset) or that lie
# elsewhere (a block's router), and what is changed in them for the tiny base.
COPIED = {
    "flylora": {},
    "goat": {"r": FAMILY_RANK, "num_experts": 4},
    "mixlora": {"r": FAMILY_RANK, "num_experts": 4},
}

# TRL 0.29.1 with transformers 5.19 and PEFT 0.20; TRL 1.16 with transformers 5.23 and PEFT 0.21.2.
ENVIRONMENTS = ["ms_swift", "trl"]


def family(preset: str) -> dict:
    """A preset's changed options as Python values."""
    return {"preset": preset, "r": FAMILY_RANK, **family_values(preset)}


def jobs(folder: Path, model_dir: Path, files: dict[str, Path]) -> list[dict]:
    def job(name: str, trainer: str, adapter: dict | None, arguments: dict, **rest) -> dict:
        return {
            "trainer": trainer,
            "model": str(model_dir),
            "data": str(files[trainer]),
            "arguments": {"output_dir": str(folder / name), **arguments},
            **({} if adapter is None else {"adapter": adapter}),
            **rest,
        }

    everything = {"per_device_train_batch_size": 16, "beta": BETA}
    flat = {"padding_free": True, "max_length": None}
    packed = {"packing": True, "max_length": 64, "max_steps": 2}
    groups = {"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 4}
    groups |= {"max_completion_length": 8, "beta": 0.5}
    return [
        job("dpo", "dpo", NO_DROPOUT, GRADAMW),
        job("precomputed", "dpo", NO_DROPOUT, {**GRADAMW, "precompute_ref_log_probs": True}),
        job("still", "dpo", NO_DROPOUT, {**STANDING_STILL, **everything}, random_b=True),
        job("again", "dpo", None, GRADAMW, continue_from=str(folder / "dpo")),
        *(
            job(f"{preset}-before", "sft", {"preset": preset, **changes}, SHORT)
            for preset, changes in COPIED.items()
        ),
        *(
            job(f"{preset}-again", "dpo", None, GRADAMW, continue_from=f"{folder}/{preset}-before")
            for preset in COPIED
        ),
        job("kto-again", "kto", None, GRADAMW, continue_from=str(folder / "dpo")),
        job("grpo-again", "grpo", None, {**GRADAMW, **groups}, continue_from=str(folder / "dpo")),
        job("padded", "sft", AUX, GRADAMW),
        job("flat", "sft", AUX, {**GRADAMW, **flat}),
        job("packed", "sft", AUX, {**GRADAMW, **packed}),
        *(
            job(f"family-{preset}", "sft", family(preset), {**GRADAMW, "max_steps": 2})
            for preset in FAMILY
        ),
    ]


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def folder(request, tmp_path_factory, model_dir, sft_file, dpo_file) -> Path:
    """All runs of an environment in one process."""
    folder = tmp_path_factory.mktemp(f"{request.param}-own")
    file = folder / "runs.json"
    files = {"sft": sft_file, "dpo": dpo_file, "kto": sft_file, "grpo": sft_file}
    file.write_text(json.dumps(jobs(folder, model_dir, files)))
    request.getfixturevalue(request.param).run("python", str(SCRIPT), str(file))
    return folder


def assert_close(found: list[float], expected: list[float], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0)


def test_the_reference_of_a_new_adapter_is_its_base(folder):
    history = losses(folder / "dpo")
    # B is zero: policy and reference are the same, and the loss is -log(1/2).
    assert_close(history[:1], [LN_2])
    assert len(set(history)) == len(history) == 8


def test_the_dpo_loss_is_the_formula(folder, model_dir, dpo_file):
    model = reload(folder / "still", model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def log_likelihood(prompt: str, answer: str) -> torch.Tensor:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
        return log_probs.gather(-1, ids[0, start:, None]).sum()

    def margin(row: dict[str, str]) -> torch.Tensor:
        return log_likelihood(row["prompt"], row["chosen"]) - log_likelihood(
            row["prompt"], row["rejected"]
        )

    rows = [json.loads(line) for line in dpo_file.read_text().splitlines()]
    policy = torch.stack([margin(row) for row in rows])
    with model.disable_adapter():
        reference = torch.stack([margin(row) for row in rows])
    expected = -torch.nn.functional.logsigmoid(BETA * (policy - reference)).mean()
    assert abs(expected - LN_2) > 0.01
    # Sums of fp32 log-likelihoods around -50 enter the loss as differences.
    assert_close(losses(folder / "still"), [float(expected)], rtol=1e-4)


def test_precomputed_references_are_the_same(folder):
    assert_close(losses(folder / "precomputed"), losses(folder / "dpo"))


def test_the_reference_of_a_saved_adapter_is_the_saved_adapter(folder):
    # TRL copies it into a second adapter, by the names of the parameters.
    assert_close(losses(folder / "again")[:1], [LN_2])
    before, after = adapter_tensors(folder / "dpo"), adapter_tensors(folder / "again")
    for name, tensor in adapter_tensors(folder / "again" / "ref").items():
        assert torch.equal(tensor, before[name]), name
        assert not torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("preset", COPIED)
def test_the_reference_has_what_never_trains(folder, preset):
    history = losses(folder / f"{preset}-again")
    assert_close(history[:1], [LN_2])
    assert len(set(history)) == len(history) == 8


@pytest.mark.parametrize("trainer", ["kto", "grpo"])
def test_a_saved_adapter_goes_on_by_other_preferences(folder, trainer):
    run = folder / f"{trainer}-again"
    if trainer == "kto":
        start = losses(run)[0]
        # TRL 0.29 has the base for a reference, whatever the adapter; later it is the saved one.
        assert (start == pytest.approx(0.5, rel=1e-6)) == folder.name.startswith("trl-own")
    else:
        kl = losses(run, "kl")
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert all(value > 1e-6 for value in kl[1:])
    assert len(set(losses(run))) == len(losses(run))
    before, after = adapter_tensors(folder / "dpo"), adapter_tensors(run)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_rows_without_padding_train_as_padded_rows(folder):
    # The same tokens, in one row or in two: sums in another order, in fp32, over eight updates.
    # Auxiliary losses that counted padding would differ.
    assert_close(losses(folder / "flat"), losses(folder / "padded"))
    for key in ("aux_switch_lb", "aux_z"):
        assert_close(losses(folder / "flat", key), losses(folder / "padded", key))
    assert torch.tensor(losses(folder / "packed")).isfinite().all()


@pytest.mark.parametrize("preset", FAMILY)
def test_a_preset_of_the_family_trains(folder, model_dir, preset):
    run = folder / f"family-{preset}"
    state = json.loads((run / "trainer_state.json").read_text())
    logged = {key for key in state["log_history"][0] if key.startswith("aux_")}
    assert_trained_preset(run, preset, logged)
    reload(run, model_dir)


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ("ms_swift", "trl"),
        ("ms_swift", "trl-dpo"),
        ("trl", "trl"),
        ("trl", "trl-dpo"),
        ("trl", "transformers"),
        ("llamafactory", "transformers"),
    ],
)
def test_what_moelora_init_writes_trains(request, environment, host, model_dir, tmp_path):
    folder = tmp_path / host
    written = write_config(host, model=str(model_dir), preset="gr", out=folder)
    (script,) = (name for name in written.files if name.endswith(".py"))
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:32]))  # two updates
    request.getfixturevalue(environment).run("python", script, cwd=folder)
    assert_trained_adapter(folder / "output", gate_rescale="sqrt", modules=8)
    assert adapter_config(folder / "output")["num_experts"] == 20
