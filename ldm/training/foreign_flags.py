"""Flags that users of diffusers' and kohya's scripts type, and what they are called here."""

from __future__ import annotations

import argparse
from typing import Any

from ldm.options import boolean, positive

PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}

# Flags without a counterpart, each with where the same thing is done here.
ELSEWHERE = {
    "--adam_beta1": "the optimizer is set in the YAML's model node",
    "--adam_beta2": "the optimizer is set in the YAML's model node",
    "--adam_epsilon": "the optimizer is set in the YAML's model node",
    "--adam_weight_decay": "the optimizer is set in the YAML's model node",
    "--allow_tf32": "set it with torch.set_float32_matmul_precision",
    "--checkpoints_total_limit": "last.ckpt is replaced each time; embeddings_gs-N.pt are a few KB each",
    "--enable_xformers_memory_efficient_attention": "attention is torch's fused one already",
    "--hub_model_id": "upload the .safetensors file yourself",
    "--hub_token": "upload the .safetensors file yourself",
    "--logging_dir": "logs lie in the run folder; --logdir moves it",
    "--lr_scheduler": "give model.params.scheduler_config in the YAML, see ldm.lr_scheduler",
    "--lr_warmup_steps": "give model.params.scheduler_config in the YAML, see ldm.lr_scheduler",
    "--no_safe_serialization": "the .pt file is always written beside the .safetensors",
    "--optimizer_type": "the optimizer is set in the YAML's model node",
    "--push_to_hub": "upload the .safetensors file yourself",
    "--report_to": "CSV and TensorBoard are written; name another logger as lightning.logger in the YAML",
    "--revision": "--actual_resume names a checkpoint file",
    "--save_as_full_pipeline": "the frozen model is not written again",
    "--tokenizer_name": "model.params.cond_stage_config.params.version=NAME",
    "--variant": "--actual_resume names a checkpoint file",
}


def add_foreign_flags(group: argparse._ArgumentGroup) -> None:
    """Add the aliases; `foreign_overrides` tells what those that are YAML keys here set."""

    def alias(*flags: str, dest: str, **kwargs: Any) -> None:
        group.add_argument(*flags, dest=dest, default=argparse.SUPPRESS, **kwargs)

    alias("--train_data_dir", dest="data_root", metavar="FOLDER", help="--data_root")
    alias("--pretrained_model_name_or_path", dest="actual_resume", metavar="CKPT", help="--actual_resume")
    alias("--placeholder_token", "--token_string", dest="placeholder_string", help="--placeholder_string")
    alias("--initializer_token", dest="init_word", help="--init_word")
    alias("--weights", dest="embedding_manager_ckpt", metavar="FILE", help="--embedding_manager_ckpt")
    alias("--output_dir", dest="logdir", metavar="FOLDER", help="--logdir")
    alias("--output_name", dest="name", help="--name")
    alias(
        "--resume_from_checkpoint", dest="resume", metavar="LOGDIR", help='--resume; "latest" is the newest'
    )

    def setting(*flags: str, help: str, **kwargs: Any) -> None:
        group.add_argument(*flags, default=None, help=help, **kwargs)

    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True}
    setting("--num_vectors", "--num_vectors_per_token", type=positive, help="num_vectors_per_token")
    setting("--learning_rate", type=float, help="base_learning_rate, with --scale_lr false unless given")
    setting("--train_batch_size", type=positive, help="data.params.batch_size")
    setting("--dataloader_num_workers", type=int, help="data.params.num_workers")
    setting("--max_train_steps", type=positive, help="--max_steps")
    setting("--num_train_epochs", type=positive, help="--max_epochs")
    setting("--gradient_accumulation_steps", type=positive, help="--accumulate_grad_batches")
    setting("--mixed_precision", choices=sorted(PRECISIONS), help="--precision")
    setting("--resolution", type=positive, help="size of the training images")
    setting("--repeats", type=positive, help="repeats of the training images")
    setting("--center_crop", **switch, help="center_crop of the training images")
    setting("--learnable_property", choices=["object", "style"], help="the dataset's templates")
    setting("--gradient_checkpointing", **switch, help="use_checkpoint of the UNet")
    setting("--save_steps", type=positive, help="steps between embeddings_gs-N.pt")
    setting("--checkpointing_steps", type=positive, help="steps between last.ckpt")
    setting("--validation_steps", type=positive, help="steps between previews")
    setting("--validation_prompt", metavar="TEXT", help="prompt of the previews")
    setting("--num_validation_images", type=positive, help="images_per_prompt of the previews")


def foreign_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Dotted YAML keys and values for the aliases that were given."""
    train, validation = "data.params.train", "data.params.validation"
    previews = "lightning.callbacks.image_logger.params"
    style = {"object": "ldm.data.personalized", "style": "ldm.data.personalized_style"}
    places = {
        "num_vectors": ["model.params.personalization_config.params.num_vectors_per_token"],
        "learning_rate": ["model.base_learning_rate"],
        "train_batch_size": ["data.params.batch_size"],
        "dataloader_num_workers": ["data.params.num_workers"],
        "max_train_steps": ["lightning.trainer.max_steps"],
        "num_train_epochs": ["lightning.trainer.max_epochs"],
        "gradient_accumulation_steps": ["lightning.trainer.accumulate_grad_batches"],
        "mixed_precision": ["lightning.trainer.precision"],
        "resolution": [f"{train}.params.size", f"{validation}.params.size"],
        "repeats": [f"{train}.params.repeats"],
        "center_crop": [f"{train}.params.center_crop", f"{validation}.params.center_crop"],
        "learnable_property": [f"{train}.target", f"{validation}.target"],
        "gradient_checkpointing": ["model.params.unet_config.params.use_checkpoint"],
        "save_steps": ["lightning.callbacks.embedding_saver.params.every_n_train_steps"],
        "checkpointing_steps": ["lightning.modelcheckpoint.params.every_n_train_steps"],
        "validation_steps": [f"{previews}.batch_frequency"],
        "validation_prompt": [f"{previews}.prompts"],
        "num_validation_images": [f"{previews}.images_per_prompt"],
    }
    found: dict[str, Any] = {}
    for flag, keys in places.items():
        value = getattr(options, flag, None)
        if value is None:
            continue
        if flag == "mixed_precision":
            value = PRECISIONS[value]
        elif flag == "learnable_property":
            value = f"{style[value]}.PersonalizedBase"
        elif flag == "validation_prompt":
            value = [value]
        found.update(dict.fromkeys(keys, value))
    return found
