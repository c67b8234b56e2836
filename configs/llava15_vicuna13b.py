"""LLaVA-1.5 with Vicuna 13B: align the connector on captions, then tune it and the language model.

    python -m vlm_jax.train --config=configs/llava15_vicuna13b.py         # 8 x 80 GB: LLaVA's own
    python -m vlm_jax.train --config=configs/llava15_vicuna13b.py:tiny    # the same, small enough for a laptop
    python -m vlm_jax.train --config=configs/llava15_vicuna13b.py:task,lora --config.data.train=my.json

The last tunes the released model on your data; add --config.data.images=photos/ if its images lie elsewhere.
Variants: lora (stage 2 by adapters), no_align (stage 2 alone, the ablation), task, tiny; together as in `:tiny,lora`.

Recipe: haotian-liu/LLaVA scripts/v1_5 (pretrain.sh, finetune.sh, finetune_lora.sh, finetune_task_lora.sh).
Data where its README puts it: LLaVA-Pretrain (558K captions) and llava_v1_5_mix665k.json with the images it names.
Aims for VQAv2 80.0, GQA 63.3, TextVQA 61.3, POPE 85.9, MME 1531.3; with lora 80.0, 63.3, 60.2, 86.7, 1541.7.
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import clip_l14_336, llava, vicuna_13b
from vlm_jax.recipe import CONNECTOR_ONLY, adapt, experiment, own_data, stage, tiny, without


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny", "task", "lora", "no_align")
    c = experiment(seed=42)
    c.model = llava(
        vision=clip_l14_336(),  # the patches of its second-last layer
        connector="mlp2x_gelu",
        decoder=vicuna_13b(),
    )
    c.parts.vision = "openai/clip-vit-large-patch14-336"
    c.parts.decoder = c.tokenizer = "lmsys/vicuna-13b-v1.5"
    c.images.mode = "pad"
    c.stages = (
        stage(
            "pretrain",
            train="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            images="playground/data/LLaVA-Pretrain/images",
            image_settings={"mode": "square"},  # stage 1 crops: pretrain.sh leaves image_aspect_ratio at its default
            template="plain",
            groups=CONNECTOR_ONLY,
            samples=256,
            lr=1e-3,
        ),
        stage(
            "finetune",
            train="playground/data/llava_v1_5_mix665k.json",
            images="playground/data",
            template="vicuna_v1",
            groups=(("vision/.*", None), (".*", 1.0)),
            samples=128,
            lr=2e-5,
        ),
    )
    c.loss_norm, c.loss_ranks = "rank_mean", 8  # the mean on each of 8 GPUs, then over them
    c.optimizer.clip_norm = None  # its DeepSpeed settings switch clipping off
    c.buckets.lengths, c.buckets.tiles = (640, 1024, 2048), (1,)
    c.data.truncate = True  # as there at model_max_length
    c.remat, c.frozen_dtype = "full", "bfloat16"
    if v.lora:
        adapt(c, rank=128, alpha=256, dropout=0.05, lr=2e-4, connector_lr=2e-5)
    if v.task:
        own_data(c, init_from="llava-hf/llava-1.5-13b-hf", vocab_size=32_064)
    if v.no_align:
        without(c, "pretrain")
    if v.tiny:
        tiny(c)
    return c
