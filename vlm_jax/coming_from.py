"""What other trainers call their settings, beside ours: read by the command line, which answers an old flag with our
name for it, and printed into docs/guides/coming_from_llava.md.

Names are those of haotian-liu/LLaVA llava/train/train.py with transformers' TrainingArguments, of LLaVA-NeXT and
Open-LLaVA-NeXT, of TRL's examples/scripts/sft_vlm.py, and of LLaMA-Factory's arguments.
"""

from __future__ import annotations

from typing import NamedTuple

GROUPS = "config.stages.finetune.groups"


class Setting(NamedTuple):
    """One setting of another trainer.

    ours: `config.KEY`, `--FLAG`, `:VARIANT` of a config, or empty where nothing is needed.
    example: a value for `config.KEY`. note: what to know, or why nothing is needed.
    """

    theirs: str
    ours: str
    example: str
    note: str


def _rows(*rows: tuple[str, str, str, str]) -> tuple[Setting, ...]:
    return tuple(Setting(*row) for row in rows)


TABLES: dict[str, tuple[Setting, ...]] = {
    "LLaVA: ModelArguments": _rows(
        ("model_name_or_path", "config.init_from", "llava-hf/llava-v1.6-mistral-7b-hf",
         "a whole LLaVA; a bare language model is config.parts.decoder"),
        ("version", "config.stages.finetune.template", "vicuna_v1", "v1 is vicuna_v1; the others keep their names"),
        ("freeze_backbone", GROUPS, "(('(vision|decoder)/.*', None), ('.*', 1.0))", "None freezes"),
        ("tune_mm_mlp_adapter", "config.stages.pretrain.groups", "(('connector/.*', 1.0), ('.*', None))",
         "is what stage pretrain does"),
        ("vision_tower", "config.parts.vision", "openai/clip-vit-large-patch14-336",
         "its weights; config.model.vision is its shape"),
        ("mm_vision_select_layer", "config.model.vision.feature_layer", "-2", "counted as there"),
        ("pretrain_mm_mlp_adapter", "config.parts.connector", "checkpoints/mm_projector.bin",
         "with the variant no_align"),
        ("mm_projector_type", "config.model.connector", "mlp2x_gelu", "linear, mlp2x_gelu or identity"),
        ("mm_use_im_start_end", "", "",
         "no released model of 1.5 or 1.6 has it; the templates v0_mmtag and v1_mmtag write tags as text"),
        ("mm_use_im_patch_token", "", "", "images are positions here, not a word of the vocabulary"),
        ("mm_patch_merge_type", "config.images.merge", "spatial_unpad", "flat, spatial or spatial_unpad"),
        ("mm_vision_select_feature", "config.model.vision.keep_class_token", "true",
         "false is patch, true is cls_patch"),
    ),
    "LLaVA: DataArguments": _rows(
        ("data_path", "config.data.train", "my.json",
         "LLaVA's JSON, JSONL or YAML of several, and the other forms of docs/reference/formats.md"),
        ("image_folder", "config.data.images", "photos/", "what the image paths are relative to"),
        ("image_aspect_ratio", "config.images.mode", "pad", "square, pad, anyres; resize squashes"),
        ("image_grid_pinpoints", "config.images.pinpoints", "((336, 672), (672, 336), (672, 672))",
         "(width, height); config.images.pinpoint_order=hw for Hugging Face's"),
        ("lazy_preprocess", "", "", "always lazy"),
        ("is_multimodal", "", "", "seen from each record: it has images, or not"),
    ),
    "LLaVA: TrainingArguments": _rows(
        ("model_max_length", "config.buckets.lengths", "1024,2048",
         "rows are padded to the smallest that holds them; the recipes cut a longer sample off there: "
         "config.data.truncate"),
        ("bits", "", "", "no 4-bit or 8-bit bases yet: config.frozen_dtype=bfloat16 with the variant lora"),
        ("double_quant", "", "", "see bits"),
        ("quant_type", "", "", "see bits"),
        ("lora_enable", ":lora", "", "a variant of every recipe"),
        ("lora_r", "config.model.lora.rank", "64", "with the variant lora"),
        ("lora_alpha", "config.model.lora.alpha", "128", "with the variant lora"),
        ("lora_dropout", "config.model.lora.dropout", "0.1", "with the variant lora"),
        ("lora_bias", "", "", "biases stay as they are (none, the default there)"),
        ("lora_weight_path", "config.init_from", "runs/adapted", "a run with adapters; with the variant lora"),
        ("mm_projector_lr", GROUPS, "(('connector/.*', 0.1), ('vision/.*', None), ('.*', 1.0))",
         "a multiplier of config.stages.finetune.lr; list every group, the first match wins"),
        ("group_by_modality_length", "", "", "text-only and image samples share batches: one program, nothing hangs"),
        ("freeze_mm_mlp_adapter", GROUPS, "(('(vision|connector)/.*', None), ('.*', 1.0))", "None freezes"),
        ("remove_unused_columns", "", "", "unknown keys of a record are kept"),
        ("cache_dir", "", "", "HF_HOME in the environment, as huggingface_hub reads it"),
        ("optim", "", "", "AdamW; config.optimizer has its settings"),
        ("mpt_attn_impl", "", "", "the fastest attention of the device is chosen"),
    ),
    "transformers: TrainingArguments": _rows(
        ("output_dir", "--workdir", "", "by default runs/<config>[-<variants>]"),
        ("per_device_train_batch_size", "config.batch.per_device", "4",
         "for memory alone; the batch is config.batch.samples, and accumulation follows from both"),
        ("gradient_accumulation_steps", "config.batch.samples", "128",
         "give the whole batch; how often to accumulate follows"),
        ("per_device_eval_batch_size", "config.eval.batch", "16", "over all devices"),
        ("learning_rate", "config.stages.finetune.lr", "2e-5", "each stage has its own"),
        ("weight_decay", "config.optimizer.weight_decay", "0.1", "never on biases and norms"),
        ("warmup_ratio", "config.stages.finetune.warmup", "0.03", "below 1 a fraction"),
        ("warmup_steps", "config.stages.finetune.warmup", "100", "from 1 on a number of steps"),
        ("lr_scheduler_type", "config.stages.finetune.schedule", "linear", "cosine, linear or constant"),
        ("num_train_epochs", "config.stages.finetune.epochs", "3", "may be a fraction"),
        ("max_steps", "config.steps", "1000", "of every stage; config.stages.finetune.steps of one"),
        ("max_grad_norm", "config.optimizer.clip_norm", "1.0",
         "LLaVA's own settings switch it off; so do the recipes of 1.0 and 1.5"),
        ("adam_beta1", "config.optimizer.b1", "0.9", ""),
        ("adam_beta2", "config.optimizer.b2", "0.95", ""),
        ("adam_epsilon", "config.optimizer.eps", "1e-6", ""),
        ("seed", "config.seed", "1", "of the order of the data, dropout and new weights"),
        ("bf16", "config.dtype", "bfloat16", "of the computation; trained weights are float32"),
        ("fp16", "config.dtype", "bfloat16", "there is no float16, and no loss scale"),
        ("tf32", "", "", "what is float32 is computed as float32"),
        ("gradient_checkpointing", "config.remat", "full", "none, full, dots or offload"),
        ("deepspeed", "config.mesh.fsdp", "8", "ZeRO-3 is fsdp=-1, the default; data=-1 with fsdp=1 replicates"),
        ("fsdp", "config.mesh.fsdp", "8", "-1 takes all devices"),
        ("dataloader_num_workers", "config.data.workers", "4", "processes; 0 reads in threads"),
        ("dataloader_drop_last", "", "", "every sample is seen; the last batch is padded"),
        ("logging_steps", "config.log.every", "1", ""),
        ("save_steps", "config.checkpoint.every", "1000", ""),
        ("save_total_limit", "config.checkpoint.keep", "1", "resuming needs one"),
        ("save_strategy", "config.checkpoint.every", "1000", "the end of each stage is always saved"),
        ("eval_strategy", "config.eval.every", "500", "steps; 0 is at the end only"),
        ("evaluation_strategy", "config.eval.every", "500", "steps; 0 is at the end only"),
        ("eval_steps", "config.eval.every", "500", ""),
        ("report_to", "config.log.wandb", "my-project", "TensorBoard is on by default: config.log.tensorboard"),
        ("run_name", "--workdir", "", "the run is called as its folder"),
        ("resume_from_checkpoint", "", "", "repeat the command: it goes on from the newest checkpoint"),
        ("overwrite_output_dir", "--workdir", "", "a folder with another run is never overwritten: name a new one"),
        ("torch_compile", "", "", "always compiled"),
        ("attn_implementation", "", "", "the fastest attention of the device is chosen"),
        ("push_to_hub", "", "", "afterwards: python -m vlm_jax.convert export WORKDIR DST --push=owner/name"),
    ),
    "LLaVA-NeXT and Open-LLaVA-NeXT": _rows(
        ("mm_tunable_parts", GROUPS, "(('vision/.*', None), ('.*', 1.0))",
         "regexes of parameter paths instead of words"),
        ("mm_vision_tower_lr", GROUPS, "(('vision/.*', 0.1), ('.*', 1.0))",
         "a multiplier of config.stages.finetune.lr"),
        ("unfreeze_mm_vision_tower", GROUPS, "(('.*', 1.0),)", "the recipes of 1.6 train the tower"),
        ("lora_qv_proj_only", "config.model.lora.targets", "decoder/layers/attention/(query|value)",
         "whole paths, never short names"),
        ("mm_patch_merge_type", "config.images.merge", "spatial_unpad",
         "anyres_max_N there is config.images.max_tiles=N here"),
    ),
    "TRL": _rows(
        ("dataset_name", "config.data.train", "my.json", "a JSON file: a data set of the hub is exported to one first"),
        ("dataset_train_split", "config.data.train", "my.json", "see dataset_name"),
        ("dataset_test_split", "config.data.eval", "held_out.json", "another file"),
        ("dtype", "config.dtype", "bfloat16", "of the computation"),
        ("torch_dtype", "config.dtype", "bfloat16", "of the computation"),
        ("use_peft", ":lora", "", "a variant of every recipe"),
        ("lora_target_modules", "config.model.lora.targets", "decoder/layers/.*", "one regex of whole paths"),
        ("load_in_4bit", "", "", "see bits of LLaVA"),
        ("load_in_8bit", "", "", "see bits of LLaVA"),
        ("max_length", "config.buckets.lengths", "2048", "images included; config.data.truncate cuts there"),
        ("max_seq_length", "config.buckets.lengths", "2048", "see max_length"),
        ("packing", "config.packing.fit", "best_fit",
         "exact: a sample never sees its neighbours, and the images are packed too"),
        ("packing_strategy", "config.packing.fit", "best_fit", "bfd is best_fit; no sample is cut to fill a row"),
        ("padding_free", "", "", "see packing"),
        ("assistant_only_loss", "", "", "always: the template says what is trained"),
        ("completion_only_loss", "", "", "always: the template says what is trained"),
    ),
    "LLaMA-Factory": _rows(
        ("stage", "", "", "supervised fine-tuning; other objectives are other configs"),
        ("do_train", "", "", "vlm_jax.train trains"),
        ("finetuning_type", ":lora", "",
         "lora; without the variant it is full, and config.stages.finetune.groups freezes"),
        ("template", "config.stages.finetune.template", "llava",
         "theirs are here as llava, llava_next, ...; the original is vicuna_v1"),
        ("dataset", "config.data.train", "my.json", "a path, not a name in dataset_info.json"),
        ("dataset_dir", "config.data.train", "data/my.json", "see dataset"),
        ("media_dir", "config.data.images", "photos/", ""),
        ("val_size", "config.data.eval", "held_out.json", "another file"),
        ("cutoff_len", "config.buckets.lengths", "2048", "images included; config.data.truncate cuts there"),
        ("max_samples", "config.stages.finetune.epochs", "0.1", "a fraction of an epoch"),
        ("preprocessing_num_workers", "config.data.workers", "4", "read while training, nothing is preprocessed"),
        ("packing", "config.packing.fit", "best_fit", "see neat_packing"),
        ("neat_packing", "config.packing.fit", "best_fit", "a sample never sees its neighbours"),
        ("overwrite_cache", "", "", "the sizes that packing measures are measured anew when a file changes"),
        ("lora_rank", "config.model.lora.rank", "8", "with the variant lora"),
        ("lora_target", "config.model.lora.targets", "decoder/layers/.*", "all there is decoder/layers/.* here"),
        ("quantization_bit", "", "", "see bits of LLaVA"),
        ("freeze_vision_tower", GROUPS, "(('vision/.*', None), ('.*', 1.0))", "None freezes"),
        ("freeze_multi_modal_projector", GROUPS, "(('(vision|connector)/.*', None), ('.*', 1.0))", "None freezes"),
        ("freeze_language_model", GROUPS, "(('(vision|decoder)/.*', None), ('.*', 1.0))", "None freezes"),
        ("image_max_pixels", "", "", "the tower's size and config.images decide"),
        ("flash_attn", "", "", "the fastest attention of the device is chosen"),
        ("plot_loss", "", "", "always: curves.png"),
        ("export_dir", "", "", "afterwards: python -m vlm_jax.convert export WORKDIR DST"),
    ),
}  # fmt: skip


def answer(flag: str, value: str) -> str | None:
    """What to write instead of `--flag=value` of another trainer; None for a flag that none of them has."""
    for system, rows in TABLES.items():
        for row in rows:
            if row.theirs == flag:
                note = f" ({row.note})" if row.note else ""
                of = f"--{flag} is a flag of {system.partition(':')[0]}"
                if not row.ours:
                    return f"{of} and not needed here: {row.note}"
                if row.ours.startswith(":"):
                    return f"{of}; here it is a variant: --config=FILE.py{row.ours}{note}"
                if row.ours.startswith("--"):
                    return f"{of}; here it is {row.ours}={value or 'DIR'}{note}"
                return f"{of}; here it is --{row.ours}, for example --{row.ours}={_shell(row.example)}{note}"
    return None


def _shell(value: str) -> str:
    return f'"{value}"' if set(value) & set("()'* |") else value


def markdown() -> str:
    """The tables as the guide shows them."""
    lines = []
    for system, rows in TABLES.items():
        lines += [f"### {system}", "", "| there | here | |", "|---|---|---|"]
        for row in rows:
            ours = f"`--{row.ours}={_shell(row.example)}`" if row.example else f"`{row.ours}`"
            cells = (f"`{row.theirs}`", ours if row.ours else "not needed", row.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
