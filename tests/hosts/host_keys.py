"""What becomes of every key of a host's config that could concern an adapter.

A key is honoured (it reaches the adapter, or the host follows it whatever the adapter is), refused
with a value other than the host's default, or has nothing to do with an adapter. A host's new
version with a key that no pattern here knows fails a test, so that somebody decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Keys:
    """The keys of one host.

    Attributes:
        concerned: which of its keys could concern an adapter, as a regular expression.
        honoured: what reaches our config or is the host's own way to it.
        refused: a value that is not the default, by key.
        host_refuses: keys that the host itself refuses beside any adapter.
        elsewhere: pattern -> why those keys have nothing to do with the adapter.
    """

    concerned: str
    honoured: frozenset[str]
    refused: dict[str, object]
    host_refuses: str = ""
    elsewhere: dict[str, str] = field(default_factory=dict)


LLAMAFACTORY = Keys(
    concerned=".*",
    honoured=frozenset(
        {
            "additional_target",
            "adapter_folder",
            "adapter_name_or_path",
            "create_new_adapter",
            "finetuning_type",
            "lora_alpha",
            "lora_dropout",
            "lora_rank",
            "lora_target",
            "use_llama_pro",  # it names the targets
            "use_rslora",
            "freeze_language_model",  # these three choose among the targets
            "freeze_multi_modal_projector",
            "freeze_vision_tower",
            "export_dir",  # a merge, which the layers refuse unless it is exact
        }
    ),
    refused={
        "use_dora": True,
        "pissa_init": True,
        "pissa_iter": 4,
        "pissa_convert": True,
        "loraplus_lr_ratio": 4.0,
        "loraplus_lr_embedding": 1e-3,
        "oft_rank": 4,
        "oft_block_size": 8,
        "oft_target": "q_proj",
        "module_dropout": 0.1,
        "freeze_trainable_layers": 1,
        "freeze_trainable_modules": "mlp",
        "freeze_extra_modules": "embed_tokens",
        "use_adam_mini": True,
        "use_muon": True,
        "use_hyper_parallel": True,
    },
    host_refuses="use_galore|use_apollo|use_badam",
    elsewhere={
        "galore_.*|apollo_.*|badam_.*": "read with use_galore, use_apollo, use_badam only",
        "hyper_parallel_args": "read with use_hyper_parallel only",
        "use_mca": "set by an environment variable, which is refused",
        "use_unsloth|use_kt|kt_.*": "refused when the adapter is put in place; kt_* go with use_kt",
        "ppo_.*|reward_.*": "of stage ppo, which is refused",
        "pref_.*|dpo_.*|kto_.*|simpo_.*|ld_alpha|ref_model.*|stage|use_(dft|asft|eaft)_loss"
        "|(asft|eaft)_alpha": "a loss and its reference",
        "use_swanlab|swanlab_.*|plot_loss|print_param_status|compute_accuracy|disable_shuffling"
        "|early_stopping_steps|include_effective_tokens_per_second": "of the run and its log",
        "pure_bf16|infer_dtype|compute_dtype|upcast_.*": "dtypes, which adapters follow",
        "quantization_.*|double_quantization|resize_vocab|add_.*|new_special_tokens_config"
        "|init_special_tokens|rope_scaling|flash_attn|shift_attn|mixture_of_depths|device_map"
        "|low_cpu_mem_usage|train_from_scratch|trust_remote_code|model_.*|use_v1_kernels"
        "|enable_liger_kernel|moe_aux_loss_coef|block_diag_attn|offload_folder": "of the base",
        "use_unsloth_gc|disable_gradient_checkpointing|use_reentrant_gc": "checkpointing",
        "use_fast_tokenizer|split_special_tokens|cache_dir|.*_hub_token|image_.*|video_.*|audio_.*"
        "|crop_to_patches|use_audio_in_video": "of data and downloads",
        "export_.*|infer_backend|use_kv_cache|vllm_.*|sglang_.*": "of export and serving",
    },
)

MS_SWIFT = Keys(
    concerned=r"(.*(lora|tuner|adapter|galore|lisa|freez|trainable_param|target|modules_to_save|"
    r"init_weights|boft|fourier|llamapro|reft|dora|_lr$|lr_ratio|unsloth|use_vllm|optim).*)|vera_.*",
    honoured=frozenset(
        {
            "adapters",
            "freeze_aligner",
            "freeze_llm",
            "freeze_vit",
            "lora_alpha",
            "lora_bias",
            "lora_dropout",
            "lora_rank",
            "modules_to_save",
            "optim",
            "optim_args",
            "optimizer",
            "ref_adapters",
            "target_modules",
            "target_regex",
            "tuner_type",
            "use_rslora",
        }
    ),
    refused={
        "use_dora": "true",
        "target_parameters": "mlp",
        "lora_dtype": "float16",
        "init_weights": "pissa",
        "use_swift_lora": "true",
        "tuner_backend": "unsloth",
        "lorap_lr_ratio": "4",
        "use_galore": "true",
        "lisa_activated_layers": "1",
        "freeze_parameters": "lm_head",
        "freeze_parameters_regex": "lm_.*",
        "freeze_parameters_ratio": "0.5",
        "trainable_parameters": "lm_head",
        "trainable_parameters_regex": "lm_.*",
        "lora_ga_batch_size": "4",
        "fourier_scaling": "2",
        "boft_block_size": "8",
        "vera_rank": "4",
        "adapter_length": "8",
        "adalora_target_r": "4",
        "llamapro_num_groups": "2",
        "reft_rank": "8",
    },
    elsewhere={
        "(lora_ga|fourier|boft|vera|adapter|adalora|llamapro|reft)_.*": "refused by its prefix",
        "galore_.*|lisa_step_interval": "read with use_galore or lisa_activated_layers only",
        "optim_target_modules": "transformers refuses it unless optim is a GaLore of its own",
        "vit_lr|aligner_lr": "groups by name, of the optimizers that swift has for them",
        "(reward|teacher)_adapters": "adapters of other models",
        "use_vllm|vllm_.*lora.*": "use_vllm is refused; the rest goes with it",
        "offload_optimizer": "of the engine",
    },
)

AXOLOTL = Keys(
    concerned=r".*(lora|peft|adapter|dora|galore|lisa_|freez|froz|_lr|lr_groups|load_in|gptq|"
    r"target|quantize|merge|unsloth|optim|jagged).*",
    honoured=frozenset(
        {
            "adapter",
            "freeze_mm_modules",
            "lora_alpha",
            "lora_dropout",
            "lora_model_dir",
            "lora_modules_to_save",
            "lora_r",
            "lora_target_linear",
            "lora_target_modules",
            "merge_lora",  # refused in a sentence, unless it is exact
            "merge_method",
            "optim_args",
            "optimizer",
            "peft_autocast_adapter_dtype",
            "peft_layers_pattern",
            "peft_layers_to_transform",
            "peft_trainable_token_indices",
            "peft_use_rslora",
        }
    ),
    refused={
        "load_in_8bit": True,
        "load_in_4bit": True,
        "lora_mlp_kernel": True,
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
        "lora_embedding_kernel": True,
        "lora_target_parameters": ["mlp.experts"],
        "lora_rank_pattern": {"q_proj": 8},
        "lora_alpha_pattern": {"q_proj": 8},
        "lora_on_cpu": True,
        "lora_fan_in_fan_out": True,
        "loraplus_lr_ratio": 4.0,
        "loraplus_lr_embedding": 1e-3,
        "peft": {"loftq_config": {"loftq_bits": 4}},
        "peft_use_dora": True,
        "peft_init_lora_weights": "pissa",
        "peft_layer_replication": [[0, 1]],
        "peft_ensure_weight_tying": True,
        "qlora_sharded_model_loading": True,
        "quantize_moe_experts": True,
        "relora": True,
        "relora_prune_ratio": 0.5,
        "relora_cpu_offload": True,
        "jagged_restart_steps": 2,
        "unfrozen_parameters": ["lm_head"],
        "lisa_n_layers": 1,
        "embedding_lr": 1e-3,
        "embedding_lr_scale": 0.5,
        "lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 1e-3}],
    },
    elsewhere={
        "qgalore_.*|optim_target_modules": "of optimizers that train the base",
        "relora_prune_method|jagged_restart_.*": "read with relora and jagged_restart_steps only",
        "lisa_.*": "read with lisa_n_layers only",
        "dion_lr|cosine_.*|lr_div_factor": "of schedules, and of an optimizer for the base",
        "gptq": "says how the base was quantised",
        "shuffle_.*": "of data",
        "flash_optimum": "of attention",
        "lr_quadratic_warmup": "of the schedule",
    },
)
