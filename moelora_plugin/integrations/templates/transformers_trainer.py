"""Fine-tune a mixture of LoRA experts with transformers' Trainer."""

#   train           python transformers_trainer.py
#   two processes   torchrun --nproc-per-node 2 transformers_trainer.py
#   resume          python transformers_trainer.py --resume
#   evaluate        moelora eval --adapter ${output_dir} --tasks ${task} --compare-base
#   merge           moelora export ${output_dir} --to merged --strategy mean-gate --out merged

import sys
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from moelora_eval_tasks.prompts import Prompt
from moelora_plugin import MoeLoraConfig
from moelora_plugin.training.examples import AnswerCollator, build_example

MODEL = "${model}"
# One row per line: {"prompt": "...", "completion": " ..."}. The text is trained as it stands, with
# the loss on completion and end of text, so `moelora eval` scores the prompts that were trained.
DATA = "${data}"
OUTPUT_DIR = "${output_dir}"
TARGET_MODULES = "${target_modules}"  # the linear modules that get experts
MAX_LENGTH = 1024  # tokens; a longer prompt loses its beginning
SEED = 42

adapter = MoeLoraConfig.from_preset(
    "${preset}",  # sets experts, rank, alpha and dropout; `moelora presets` lists them
    task_type="CAUSAL_LM",
    target_modules=TARGET_MODULES.split(","),
    # num_experts=20,  # experts in each target module
    # top_k=10,        # experts that a token goes through
    # r=4,             # rank of one expert
    # lora_alpha=16,   # the update is scaled by lora_alpha / r
    # lora_dropout=0.05,
    # gate_rescale="auto",  # sqrt with grsgd and gradamw, none with rsgd and radamw
    # aux_losses={"switch_lb": 0.001},  # keeps the experts evenly loaded; logged as aux_switch_lb
)

arguments = TrainingArguments(
    output_dir=OUTPUT_DIR,
    optim="${optimizer}",  # or rsgd, grsgd, radamw, gradamw
    # gate_lr is the routers' learning rate; the paper's 3e-8 all but freezes them. damping is added
    # to the metrics that precondition the experts' gradients.
    optim_args="gate_lr=$gate_lr,damping=1e-6",
    learning_rate=3e-5,  # the paper trains 3B models with 1e-5 to 3e-5
    adam_epsilon=1e-6,
    max_grad_norm=0.0,  # the paper clips the gates' gradient only, which the optimizer does
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    # Rows to an update: this, times gradient_accumulation_steps, times processes.
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    save_steps=100,
    save_total_limit=2,
    seed=SEED,
    report_to="none",
)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token  # masks follow lengths, not tokens


def example(row: dict[str, str]) -> dict[str, Any]:
    """A row as `input_ids` and `labels`."""
    return build_example(tokenizer, Prompt(row["prompt"], (row["completion"],), 0), MAX_LENGTH)


rows = load_dataset("json", data_files=DATA, split="train")
set_seed(SEED)  # the adapter is made before the Trainer sets the seed
trainer = Trainer(
    model=get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"), adapter),
    args=arguments,
    train_dataset=rows.map(example, remove_columns=rows.column_names),
    data_collator=AnswerCollator(tokenizer.pad_token_id),
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
trainer.save_model()
