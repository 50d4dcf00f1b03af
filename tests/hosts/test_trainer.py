"""transformers' Trainer and TRL's on top of it: transformers 5.6 to 5.23, PEFT 0.18 to 0.21.

They share everything that is ours: the optimizer's name, the default callback, the adapter. So what
holds for one must hold for all; test_trl.py has what only TRL does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_runs import (
    adapter_tensors,
    assert_same_tensors,
    assert_trained_adapter,
    losses,
    reload,
    reload_logits,
)

SCRIPT = Path(__file__).parent / "trainer_runs.py"

# The environment, and the trainer in it.
TRAINERS = [
    ("llamafactory", "trainer"),  # transformers 5.6, PEFT 0.18.1
    ("trl", "trainer"),  # transformers 5.23, PEFT 0.21.2
    ("ms_swift", "sft"),  # TRL 0.29.1, transformers 5.19, PEFT 0.20
    ("ms_swift", "dpo"),
    ("trl", "sft"),  # TRL 1.16, transformers 5.23, PEFT 0.21.2
    ("trl", "dpo"),
]
# transformers 5.6 reads an optimizer's state onto "cpu:0" where two processes share a CPU, which
# torch refuses, whatever the adapter and the optimizer.
NO_RESUME_IN_TWO = "llamafactory"
GRADAMW = {"optim": "gradamw", "optim_args": "gate_lr=1e-3,damping=1e-4"}
AUX_LOSSES = {"switch_lb": 0.3, "z": 0.02}
MODULES = 4  # q_proj and down_proj of two layers

# Gradients of the loss added by hand: plain SGD, so that a difference stays what it is; seven
# batches and updates of three, so that an epoch's last update is a short one.
BY_HAND = {
    "optim": "sgd",
    "gradient_accumulation_steps": 3,
    "max_steps": 6,
    "gradient_checkpointing": False,
}
# All rows in each step, and no state in the optimizer: nothing but the adapter goes on.
FULL_BATCH = {"optim": "rsgd", "optim_args": "damping=1e-2", "per_device_train_batch_size": 16}

Jobs = list[dict]


def jobs(
    trainer: str, folder: Path, model_dir: Path, data: Path, resumes_in_two: bool
) -> dict[str, Jobs]:
    """The runs of one trainer: in one process, in two, and plain LoRA in one without moelora."""

    def job(name: str, adapter: dict | None, arguments: dict, **rest) -> dict:
        if trainer == "dpo":
            arguments = {"disable_dropout": False, **arguments}
        return {
            "trainer": trainer,
            "model": str(model_dir),
            "data": str(data),
            "arguments": {"output_dir": str(folder / name), **arguments},
            **({} if adapter is None else {"adapter": adapter}),
            **rest,
        }

    saving = {**GRADAMW, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    dropping = {"lora_dropout": 0.1}
    none = {"lora_dropout": 0.0}
    with_aux = {**none, "aux_losses": AUX_LOSSES}
    by_hand = {"rows": 14, "random_b": True}
    one = [
        job("whole", dropping, saving),
        job("resumed", dropping, saving, resume=str(folder / "whole" / "checkpoint-3")),
        job(
            "other",
            {**dropping, "top_k": 1},
            saving,
            resume=str(folder / "whole" / "checkpoint-3"),
            refused=True,
        ),
        {"infer": str(folder / "whole"), "model": str(model_dir)},
        job("four-steps", none, {**FULL_BATCH, "max_steps": 4}),
        job("two-steps", none, {**FULL_BATCH, "max_steps": 2}),
        job(
            "continued",
            None,
            {**FULL_BATCH, "max_steps": 2},
            continue_from=str(folder / "two-steps"),
        ),
        job("four-rows", none, {**GRADAMW, "per_device_train_batch_size": 4}),
        job("twice-two-rows", none, {**GRADAMW, "gradient_accumulation_steps": 2}),
        job("one-process", with_aux, {**GRADAMW, "gradient_accumulation_steps": 2}),
        job("by-hand", none, BY_HAND, by_hand=AUX_LOSSES, **by_hand),
        job("aux", with_aux, BY_HAND, **by_hand),
        job("no-aux", none, BY_HAND, **by_hand),
        *(
            job(
                f"aux-reentrant-{reentrant}",
                with_aux,
                {
                    **BY_HAND,
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                },
                **by_hand,
            )
            for reentrant in (False, True)
        ),
        job("lora", None, {}),
    ]
    saving = {**saving, "ddp_backend": "gloo"}
    two = [
        job("two-processes", with_aux, {**GRADAMW, "ddp_backend": "gloo"}),
        job("whole-2", dropping, saving),
    ]
    if resumes_in_two:
        checkpoint = str(folder / "whole-2" / "checkpoint-3")
        two.append(job("resumed-2", dropping, saving, resume=checkpoint))
    return {"one": one, "two": two, "without": [job("lora-without", None, {})]}


@pytest.fixture(scope="module")
def run_host(request, tmp_path_factory, model_dir, sft_file, dpo_file) -> Callable[[str], Path]:
    """Runs all jobs of an environment, once, with one start for each kind of process."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name in done:
            return done[name]
        host, folder = request.getfixturevalue(name), tmp_path_factory.mktemp(f"{name}-runs")
        parts = [
            jobs(
                trainer,
                folder / trainer,
                model_dir,
                dpo_file if trainer == "dpo" else sft_file,
                resumes_in_two=name != NO_RESUME_IN_TWO,
            )
            for environment, trainer in TRAINERS
            if environment == name
        ]
        for kind in ("one", "two", "without"):
            file = folder / f"{kind}.json"
            file.write_text(json.dumps([job for part in parts for job in part[kind]]))
            start = (
                ["torchrun", "--standalone", "--nproc-per-node=2"] if kind == "two" else ["python"]
            )
            host.run(*start, str(SCRIPT), str(file), moelora=kind != "without")
        done[name] = folder
        return folder

    return run


@pytest.fixture(scope="module", params=TRAINERS, ids="-".join)
def folder(request, run_host) -> Path:
    """The finished runs of one trainer."""
    environment, trainer = request.param
    return run_host(environment) / trainer


def assert_close(found: list[float], expected: list[float], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0)


def test_an_adapter_is_trained(folder):
    assert_trained_adapter(folder / "whole", gate_rescale="sqrt", modules=MODULES)
    history = losses(folder / "whole")
    assert len(history) == 6
    assert torch.tensor(history).isfinite().all()


@pytest.mark.parametrize("processes", ["", "-2"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, processes):
    whole, resumed = folder / f"whole{processes}", folder / f"resumed{processes}"
    if processes and NO_RESUME_IN_TWO in folder.parent.name:
        pytest.skip("transformers 5.6 cannot resume in two processes on CPU")
    assert losses(resumed) == losses(whole)  # with dropout: the random state is restored too
    assert_same_tensors(resumed, whole)


def test_a_resumed_run_asks_for_the_adapter_of_its_checkpoint(folder):
    said = (folder / "other" / "refused.txt").read_text()
    checkpoint = folder / "whole" / "checkpoint-3"
    assert said.startswith(f"top_k is 1 in this run, and the checkpoint in {checkpoint} was")


def test_two_processes_train_as_one(folder):
    # fp32: a sum over two batches is taken in another order, and eight updates go on from it.
    one, two = folder / "one-process", folder / "two-processes"
    assert_close(losses(two), losses(one), rtol=1e-5)
    assert len(losses(two, "aux_switch_lb")) == 8


def test_accumulation_trains_as_one_batch(folder):
    # fp32: as above, and the batch of four rows is padded to its own longest row.
    assert_close(losses(folder / "twice-two-rows"), losses(folder / "four-rows"), rtol=1e-5)


def test_a_saved_adapter_goes_on_where_it_was(folder):
    if folder.name == "dpo":
        pytest.skip("TRL's reference is then the saved adapter: see test_trl.py")
    expected = losses(folder / "four-steps")
    # The batch's rows come in another order, which changes sums in fp32.
    assert_close(losses(folder / "two-steps"), expected[:2], rtol=1e-5)
    assert_close(losses(folder / "continued"), expected[2:], rtol=1e-5)
    assert expected[3] < expected[0]


@pytest.mark.parametrize("run", ["aux", "aux-reentrant-False", "aux-reentrant-True"])
def test_auxiliary_losses_equal_the_loss_added_by_hand(folder, run):
    expected, found = adapter_tensors(folder / "by-hand"), adapter_tensors(folder / run)
    without = adapter_tensors(folder / "no-aux")
    for name, tensor in expected.items():
        effect = (tensor - without[name]).norm()
        assert effect > 0, name
        # fp32 sums in another order, beside what the losses themselves do in six updates.
        assert (found[name] - tensor).norm() < 1e-3 * effect, name
    assert all(1.9 < value < 4 for value in losses(folder / run, "aux_switch_lb"))
    assert len(losses(folder / run, "aux_z")) == 6


def test_plain_lora_is_untouched(folder):
    assert losses(folder / "lora") == losses(folder / "lora-without")
    assert_same_tensors(folder / "lora", folder / "lora-without")


def test_inference_is_unmerged_and_merging_is_refused(folder, model_dir):
    answer = json.loads((folder / "whole" / "infer.json").read_text())
    logits = torch.tensor(answer["logits"])
    # fp32 through another release of transformers.
    torch.testing.assert_close(
        reload_logits(folder / "whole", model_dir), logits, rtol=1e-5, atol=1e-5
    )
    model = reload(folder / "whole", model_dir)
    ids = torch.arange(3, 35).view(2, 16)
    assert (
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
        == answer["greedy"]
    )
    assert answer["merge"].startswith("The gates of this adapter follow the input")
    assert "moelora export" in answer["merge"]
