"""Realistic files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.workflows.guidance.other_tools.read import OtherFile, read_other_file

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train
    shards: 10
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 4
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
"""
FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine, chats
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_output_dir: true
output_dir: saves/qwen3
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
bf16: true
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
report_to: none
"""
TRL: dict[str, Any] = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "dataset_name": "trl-lib/Capybara",
    "dataset_config": "default",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "learning_rate": 2.0e-4,
    "max_steps": 200,
    "warmup_steps": 20,
    "gradient_accumulation_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "epoch",
    "packing": True,
    "completion_only_loss": False,
    "use_peft": True,
    "peft_config": {
        "r": 32,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_dora": True,
    },
    "model_init_kwargs": {"torch_dtype": "torch.bfloat16"},
    "optim": "adafactor",
    "report_to": ["tensorboard"],
    "lr_scheduler_type": "polynomial",
}
MLX = """\
model: mlx-community/Llama-3.2-1B-Instruct
train: true
data: my/chats
fine_tune_type: lora
num_layers: 16
batch_size: 4
iters: 1000
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
save_every: 100
max_seq_length: 2048
grad_checkpoint: true
mask_prompt: false
lora_parameters:
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  arguments: [1e-5, 1000]
"""


def read(name: str, text: str) -> OtherFile:
    Path(name).write_text(text)
    return read_other_file(Path(name))
