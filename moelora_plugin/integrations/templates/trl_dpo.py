"""Train a mixture of LoRA experts on preferences with TRL's DPOTrainer."""

#   train           python trl_dpo.py
#   two processes   torchrun --nproc-per-node 2 trl_dpo.py
#   resume          python trl_dpo.py --resume
#   evaluate        moelora eval --adapter ${output_dir} --tasks ${task} --compare-base
#   merge           moelora export ${output_dir} --to merged --strategy mean-gate --out merged

import sys

import torch
from datasets import load_dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from moelora_plugin import MoeLoraConfig

MODEL = "${model}"
# One row per line: {"prompt": "...", "chosen": " ...", "rejected": " ..."}, trained as they stand.
DATA = "${data}"
OUTPUT_DIR = "${output_dir}"
TARGET_MODULES = "${target_modules}"  # the linear modules that get experts
SEED = 42

adapter = MoeLoraConfig.from_preset(
    "${preset}",  # sets experts, rank, alpha and dropout; `moelora presets` lists them
    task_type="CAUSAL_LM",
    target_modules=TARGET_MODULES.split(","),
    # num_experts=20,  # experts in each target module
    # top_k=10,        # experts that a token goes through
    # r=4,             # rank of one expert
    # lora_alpha=16,   # the update is scaled by lora_alpha / r
    # gate_rescale="auto",  # sqrt with grsgd and gradamw, none with rsgd and radamw
    # aux_losses={"switch_lb": 0.001},  # keeps the experts evenly loaded; logged as aux_switch_lb
)

arguments = DPOConfig(
    output_dir=OUTPUT_DIR,
    beta=0.1,  # how strongly the reference, which is the model without adapter, holds
    optim="${optimizer}",  # or rsgd, grsgd, radamw, gradamw
    # gate_lr is the routers' learning rate; the paper's 3e-8 all but freezes them. damping is added
    # to the metrics that precondition the experts' gradients.
    optim_args="gate_lr=$gate_lr,damping=1e-6",
    learning_rate=3e-5,  # the paper trains 3B models with 1e-5 to 3e-5, with SFT
    adam_epsilon=1e-6,
    max_grad_norm=0.0,  # the paper clips the gates' gradient only, which the optimizer does
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    # Pairs to an update: this, times gradient_accumulation_steps, times processes.
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    max_length=1024,  # tokens of prompt and answer
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    save_steps=100,
    save_total_limit=2,
    seed=SEED,
    report_to="none",
    model_init_kwargs={"dtype": "auto"},
)

set_seed(SEED)  # TRL makes the adapter before it sets the seed
trainer = DPOTrainer(
    model=MODEL,
    args=arguments,
    train_dataset=load_dataset("json", data_files=DATA, split="train"),
    peft_config=adapter,
)
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
trainer.save_model()
