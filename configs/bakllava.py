"""BakLLaVA: LLaVA-1.5 on Mistral 7B v0.1: align the connector on captions, then tune it and the language model.

    python -m vlm_jax.train --config=configs/bakllava.py         # 8 x 80 GB
    python -m vlm_jax.train --config=configs/bakllava.py:tiny    # the same, small enough for a laptop
    python -m vlm_jax.train --config=configs/bakllava.py:task,lora --config.data.train=my.json

The last tunes the released model on your data; add --config.data.images=photos/ if its images lie elsewhere.
Variants: lora (stage 2 by adapters), no_align (stage 2 alone, the ablation), task, tiny; together as in `:tiny,lora`.

Recipe: LLaVA-1.5's (haotian-liu/LLaVA scripts/v1_5), which its model card names; SkunkworksAI also used private data.
Data where LLaVA's README puts it: LLaVA-Pretrain (558K captions) and llava_v1_5_mix665k.json with the images it names.
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import clip_l14_336, llava, mistral_7b
from vlm_jax.recipe import CONNECTOR_ONLY, adapt, experiment, own_data, stage, tiny, without


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny", "task", "lora", "no_align")
    c = experiment(seed=42)
    c.model = llava(
        vision=clip_l14_336(),  # the patches of its second-last layer
        connector="mlp2x_gelu",
        decoder=mistral_7b(),  # v0.1, with its window of 4,096 tokens
    )
    c.parts.vision = "openai/clip-vit-large-patch14-336"
    c.parts.decoder = c.tokenizer = "mistralai/Mistral-7B-v0.1"
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
        own_data(c, init_from="llava-hf/bakLlava-v1-hf", vocab_size=32_064)
    if v.no_align:
        without(c, "pretrain")
    if v.tiny:
        tiny(c)
    return c
