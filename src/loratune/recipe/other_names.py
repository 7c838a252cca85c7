"""The names that other tools give to settings and values, and what they are called here.

From TRL, PEFT, transformers, Axolotl, LLaMA-Factory, Unsloth and mlx-lm. An unknown setting or value that stands here
is answered with loratune's name instead of the nearest spelling.
"""

from __future__ import annotations

NO_COUNTERPART = "-"
"""Starts the answer for a setting that loratune does not have, and says why."""

SETTINGS: dict[str, str] = {
    # ---- the base model
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "model_id": "model.name",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "compute_dtype": "model.dtype",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=float16",
    "load_in_4bit": "model.quantization=nf4",
    "load_in_8bit": "model.quantization=int8",
    "quantize": "model.quantization=nf4",
    "quantization_bit": "model.quantization=nf4; 8 bits: int8",
    "bnb_4bit_quant_type": "model.quantization=nf4",
    "quantization_config": "model.quantization=nf4",
    "fp8": "model.quantization=fp8",
    "finetuning_type": f"{NO_COUNTERPART}every run trains LoRA",
    # ---- the data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "test_size": "data.eval",
    "eval_split": "data.eval",
    "dataset_text_field": "data.columns={text: NAME}",
    "field_messages": "data.columns={messages: NAME}",
    "prompt_column": "data.columns={prompt: NAME}",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "completion_only_loss": "data.train_on=assistant",
    "assistant_only_loss": "data.train_on=assistant",
    "mask_prompt": "data.train_on=assistant",
    "train_on_inputs": "data.train_on=all",
    "train_on_prompt": "data.train_on=all",
    "roles_to_train": "data.train_on",
    "mask_history": "data.train_on=last",
    "chat_template": f"{NO_COUNTERPART}the template is the tokenizer's own, in the folder of the model",
    "packing": f"{NO_COUNTERPART}examples are always packed without padding, and attention never crosses them",
    "sample_packing": f"{NO_COUNTERPART}examples are always packed without padding, and attention never crosses them",
    "group_by_length": f"{NO_COUNTERPART}there is no padding to save: micro-batches are flat",
    "pad_to_sequence_len": f"{NO_COUNTERPART}micro-batches are flat, without padding",
    # ---- the adapter
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "scale": "lora.alpha; it is scale × lora.r",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lora_target_linear": "lora.targets=complete",
    "keys": "lora.targets",
    "num_layers": "lora.layers; last N for that many from the top",
    "lora_layers": "lora.layers; last N for that many from the top",
    "layers_to_transform": "lora.layers",
    "use_dora": "lora.variant=dora",
    "peft_use_dora": "lora.variant=dora",
    "use_rslora": "lora.variant=rslora",
    "peft_use_rslora": "lora.variant=rslora",
    "init_lora_weights": "lora.variant; pissa, olora, eva or loftq",
    "pissa_init": "lora.variant=pissa",
    "loftq_config": "lora.variant=loftq",
    "use_loftq": "lora.variant=loftq",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "lora_model_dir": "lora.start_from",
    "adapter_name_or_path": "lora.start_from",
    "resume_adapter_file": "lora.start_from",
    "new_special_tokens": "lora.new_tokens",
    "tokens": "lora.new_tokens",
    "bias": f"{NO_COUNTERPART}biases are not trained",
    "task_type": "model.task",
    # ---- the optimization
    "output": "train.output_dir",
    "out_dir": "train.output_dir",
    "adapter_path": "train.output_dir",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": f"{NO_COUNTERPART}set train.epochs, which may be a fraction: steps × train.batch_size / examples",
    "iters": f"{NO_COUNTERPART}set train.epochs, which may be a fraction: steps × train.batch_size / examples",
    "lr": "train.learning_rate",
    "loraplus_lr_ratio": "train.lora_plus_ratio",
    "per_device_train_batch_size": "train.batch_size; it counts all examples of an optimizer step",
    "micro_batch_size": "train.batch_size; it counts all examples of an optimizer step",
    "gradient_accumulation_steps": "train.batch_size; it counts all examples of an optimizer step",
    "grad_accumulation_steps": "train.batch_size; it counts all examples of an optimizer step",
    "per_device_eval_batch_size": "train.token_budget",
    "auto_find_batch_size": "train.token_budget=auto",
    "optim": "train.optimizer",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "lr_schedule": "train.schedule",
    "warmup_ratio": "train.warmup_fraction",
    "warmup_steps": "train.warmup_fraction; a fraction of all steps",
    "warmup": "train.warmup_fraction; a fraction of all steps",
    "gradient_clipping": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "random_state": "train.seed",
    "gradient_checkpointing": "train.recompute",
    "use_gradient_checkpointing": "train.recompute",
    "grad_checkpoint": "train.recompute",
    "torch_compile": "train.compile",
    "eval_steps": "train.eval_every",
    "evals_per_epoch": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "steps_per_eval": "train.eval_every",
    "save_steps": "train.save_every",
    "saves_per_epoch": "train.save_every",
    "save_strategy": "train.save_every",
    "logging_steps": "train.log_every",
    "steps_per_report": "train.log_every",
    "logging_strategy": "train.log_every",
    "save_total_limit": "train.keep_checkpoints",
    "load_best_model_at_end": "train.final_adapter=best",
    "early_stopping_patience": "train.early_stopping",
    "patience": "train.early_stopping",
    "label_smoothing_factor": "train.label_smoothing",
    "use_wandb": "train.report_to=[wandb]",
    "wandb_project": "train.report_to=[wandb]; WANDB_PROJECT names the project",
    "deepspeed": "train.strategy=fsdp",
    "fsdp": "train.strategy=fsdp",
    "flash_attention": f"{NO_COUNTERPART}the fastest attention that equals the plain one is chosen",
    "attn_implementation": f"{NO_COUNTERPART}the fastest attention that equals the plain one is chosen",
    "use_liger_kernel": f"{NO_COUNTERPART}the fused kernels are always used",
    # ---- preferences
    "rl": "model.task=preference; preference.loss is dpo, ipo, orpo or simpo",
    "loss_type": "preference.loss",
    "pref_loss": "preference.loss",
    "dpo_beta": "preference.beta",
    "rl_beta": "preference.beta",
    "pref_beta": "preference.beta",
    "orpo_alpha": "preference.beta",
    "dpo_label_smoothing": "preference.label_smoothing",
    "rpo_alpha": "preference.sft_weight",
    "pref_ftx": "preference.sft_weight",
    "simpo_gamma": "preference.target_margin",
    "ref_model": f"{NO_COUNTERPART}the reference is the model before step 1, with the adapter of lora.start_from",
    "precompute_ref_log_probs": f"{NO_COUNTERPART}the reference is always computed once, before step 1",
    # ---- the evaluation
    "max_completion_length": "evaluate.max_new_tokens",
    "compute_metrics": "evaluate.metric",
}
"""A setting of another tool → the setting here, with its value where it is another one, and a remark."""

VALUES: dict[str, dict[str, str]] = {
    "lora.targets": {"all-linear": "complete", "all_linear": "complete", "all": "complete", "linear": "complete"},
    "model.quantization": {
        **dict.fromkeys(("4bit", "4", "int4", "qlora", "bnb4", "bnb_4bit", "fp4"), "nf4"),
        **dict.fromkeys(("8bit", "8", "llm_int8", "bnb8", "bnb_8bit"), "int8"),
    },
    "model.dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"},
    "train.optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "paged_adamw_8bit", "adamw8bit"), "adamw_8bit"),
        **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "lion_32bit"), "lion"),
    },
    "train.schedule": {
        "constant_with_warmup": "constant",
        "cosine_decay": "cosine",
        "wsd": "warmup_stable_decay",
        "linear_schedule": "linear",
    },
    "train.eval_every": {"no": "never", "steps": "100", "epochs": "epoch"},
    "train.save_every": {"no": "never", "steps": "100", "epochs": "epoch"},
    "train.log_every": {"no": "never", "steps": "10", "epochs": "epoch"},
    "train.strategy": {"deepspeed": "fsdp", "zero3": "fsdp"},
    "data.format": {"chatml": "messages", "chat_template": "messages", "openai": "messages", "completion": "text"},
    "data.train_on": {"completion": "assistant", "answers": "assistant", "model": "assistant"},
    "preference.loss": {"sigmoid": "dpo"},
    "evaluate.metric": {"exact": "exact_match", "accuracy": "exact_match", "em": "exact_match"},
}
"""A setting → values that other tools use → the value here."""


def named_here(name: str) -> str:
    """Return what another tool's setting is called here, for an error message; empty if the name is not known.

    Args:
        name: The setting, with or without a section.
    """
    found = SETTINGS.get(name.rpartition(".")[2].lower().replace("-", "_"), "")
    if found.startswith(NO_COUNTERPART):
        return f"not needed here: {found.removeprefix(NO_COUNTERPART)}"
    return f"here it is {found}" if found else ""


def value_here(setting: str, value: str) -> str:
    """Return the value here for another tool's value; empty if it is not known."""
    return VALUES.get(setting, {}).get(value.lower(), "")
