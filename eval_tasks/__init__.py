"""Evaluation tasks: the catalog, the one prompt module, loaders, metrics and lm-eval's YAML files.

Imports as `moelora_eval_tasks`. Training and evaluation both read their tasks from here, so what is
trained is what is scored. Nothing in this package imports torch.
"""
