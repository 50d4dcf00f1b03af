"""Hosts: the programs that people train with. A file or folder each, which alone imports it.

Each translates the host's config and calls the same functions: `options.adapter_config`,
`peft.get_peft_model`, `hf_trainer.optimizer_arguments` and `optim.build_optimizer`.
"""
