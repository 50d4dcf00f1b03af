"""Trainings with TRL's trainers and with transformers' own, as a user's script does them.

    python trainer_runs.py runs.json

`runs.json` lists runs; each is a mapping:

    trainer        "trainer", or TRL's: "sft", "dpo", "kto" (every other answer is a wrong one) or
                   "grpo" (rewards differ, and say nothing)
    model, data    a base model's folder, a JSONL file
    rows           use only the first so many rows
    adapter        fields of MoeLoraConfig, and `preset`; without it the run is one of plain LoRA
    seed           for the adapter's initialisation
    continue_from  an adapter to go on with in place of a new one
    random_b       start from experts that do something already
    by_hand        coefficients of auxiliary losses to add to the loss here, outside of the adapter
    arguments      of TrainingArguments, SFTConfig, DPOConfig, ...
    resume         a checkpoint
    refused        the run is expected to fail; what is said is left in refused.txt

It leaves in `arguments["output_dir"]` what a stock script leaves: the adapter and
trainer_state.json.

`{"infer": adapter, "model": ...}` instead loads an adapter with PEFT alone and leaves `infer.json`
beside it: logits, a greedy continuation and what merging says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

DEFAULTS = {
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "bf16": False,
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def peft_config(run):
    if "adapter" not in run:
        return LoraConfig(**LORA, lora_dropout=0.1)
    from moelora_plugin import MoeLoraConfig

    if "preset" in run["adapter"]:
        fields = dict(run["adapter"])
        return MoeLoraConfig.from_preset(fields.pop("preset"), task_type="CAUSAL_LM", **fields)
    return MoeLoraConfig(**{**LORA, "r": 2, "num_experts": 4, "top_k": 2, **run["adapter"]})


def tokenised(rows, tokenizer):
    """Prompt, completion and EOS, with the loss on the last two."""

    def example(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    return rows.map(example, remove_columns=rows.column_names, keep_in_memory=True)


def padded(examples, pad_token_id):
    length = max(len(example["input_ids"]) for example in examples)

    def column(of, filler):
        rows = [of(example) for example in examples]
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    return {
        "input_ids": column(lambda e: e["input_ids"], pad_token_id),
        "attention_mask": column(lambda e: [1] * len(e["input_ids"]), 0),
        "labels": column(lambda e: e["labels"], -100),
    }


def by_hand(trainer_class, coefficients):
    """The trainer with auxiliary losses added to its loss, as somebody would without us."""
    from moelora_plugin.losses import LOSSES, LossInput
    from moelora_plugin.model import moelora_layers

    class ByHand(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            real = inputs["attention_mask"].bool().flatten()
            layers = moelora_layers(self.model).values()
            routings, hooks = [], []
            for layer in layers:
                router = layer.moelora_router["default"]
                hooks.append(router.register_forward_hook(lambda *call: routings.append(call[-1])))
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            for hook in hooks:
                hook.remove()
            assert len(routings) == len(layers)
            summand = sum(
                coefficient * LOSSES[name](LossInput(routing, real)) / len(layers)
                for routing in routings
                for name, coefficient in coefficients.items()
            )
            # The Trainer divides a loss by the number of micro-batches unless it was normalised by
            # the tokens of the whole update.
            if num_items_in_batch is not None:
                summand = summand / self.current_gradient_accumulation_steps
            return loss + summand

    return ByHand


def letters(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def build(run):
    """The trainer of a run."""
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    rows = load_dataset("json", data_files=run["data"], split="train")
    rows = rows.select(range(run.get("rows", len(rows))))
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32")
    arguments = {**DEFAULTS, **run["arguments"]}
    wraps = run["trainer"] != "trainer"  # TRL makes the PeftModel itself
    config = peft_config(run)
    if "continue_from" in run:
        model = PeftModel.from_pretrained(model, run["continue_from"], is_trainable=True)
        config = None
    elif not wraps:
        set_seed(run.get("seed", 0))
        model = get_peft_model(model, config)
        if run["arguments"].get("gradient_checkpointing"):
            model.enable_input_require_grads()  # as PEFT asks for; TRL does it itself
    extra = {}
    if run["trainer"] == "sft":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as trainer_class

        extra = {"peft_config": config}
    elif run["trainer"] == "dpo":
        from trl import DPOConfig as Arguments
        from trl import DPOTrainer as trainer_class

        extra = {"peft_config": config}
    elif run["trainer"] == "kto":
        try:
            from trl import KTOConfig as Arguments
            from trl import KTOTrainer as trainer_class
        except ImportError:  # before TRL 1.0
            from trl.experimental.kto import KTOConfig as Arguments
            from trl.experimental.kto import KTOTrainer as trainer_class

        rows = rows.add_column("label", [n % 2 == 0 for n in range(len(rows))])
        extra = {"peft_config": config}
    elif run["trainer"] == "grpo":
        from trl import GRPOConfig as Arguments
        from trl import GRPOTrainer as trainer_class

        rows = rows.select_columns(["prompt"])
        extra = {"peft_config": config, "reward_funcs": letters}
    else:
        Arguments, trainer_class = TrainingArguments, Trainer
        pad_token_id = tokenizer.pad_token_id
        rows = tokenised(rows, tokenizer)
        extra = {"data_collator": lambda examples: padded(examples, pad_token_id)}
    if "by_hand" in run:
        trainer_class = by_hand(trainer_class, run["by_hand"])
    set_seed(run.get("seed", 0))  # TRL makes the adapter before the Trainer sets the seed
    trainer = trainer_class(
        model=model,
        args=Arguments(**arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        **extra,
    )
    if run.get("random_b"):
        for name, parameter in trainer.model.named_parameters():
            if "moelora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def infer(run):
    """What PEFT and transformers make of an adapter."""
    base = AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32")
    model = PeftModel.from_pretrained(base, run["infer"]).eval()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    try:
        model.merge_and_unload()
        merged = "merged"
    except Exception as error:
        merged = str(error)
    answer = {"logits": logits.tolist(), "greedy": greedy.tolist(), "merge": merged}
    Path(run["infer"], "infer.json").write_text(json.dumps(answer))


def main(file):
    for run in json.loads(Path(file).read_text()):
        if "infer" in run:
            infer(run)
            continue
        trainer = build(run)
        if run.get("refused"):
            try:
                trainer.train(resume_from_checkpoint=run.get("resume"))
            except Exception as error:
                Path(run["arguments"]["output_dir"], "refused.txt").write_text(str(error))
            continue
        trainer.train(resume_from_checkpoint=run.get("resume"))
        trainer.save_model()
        trainer.save_state()
    if torch.distributed.is_initialized():
        # Not through the destructors: gloo's now and then waits there for a thread that waits for
        # the interpreter (torch 2.13), for ever.
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
