"""LLaVA-1.0 with Vicuna 13B: align one linear layer on captions, then tune it and the language model.

    python -m vlm_jax.train --config=configs/llava10_vicuna13b.py         # 8 x 80 GB: stage 1 took 4 h there
    python -m vlm_jax.train --config=configs/llava10_vicuna13b.py:tiny    # the same, small enough for a laptop
    python -m vlm_jax.train --config=configs/llava10_vicuna13b.py:task,lora --config.data.train=my.json

The last tunes a released model on your data; add --config.data.images=photos/ if its images lie elsewhere. It is that
of July 2023 at 336 pixels, since those of the paper were only released as differences to LLaMA.
Variants: lora (stage 2 by adapters), no_align (stage 2 alone, the ablation), task, tiny; together as in `:tiny,lora`.

Recipe: haotian-liu/LLaVA scripts/pretrain.sh, finetune_full_schedule.sh, finetune_lora.sh. Data where its README puts
it: LLaVA-CC3M-Pretrain-595K and llava_instruct_158k.json on the images of COCO train2014.
Aims for LLaVA-Bench (COCO) 85.1 % of GPT-4 (Vicuna v0 in the paper).
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import clip_l14_224, clip_l14_336, llava, vicuna_13b
from vlm_jax.recipe import CONNECTOR_ONLY, adapt, experiment, own_data, stage, tiny, without


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny", "task", "lora", "no_align")
    c = experiment(seed=42)
    c.model = llava(
        vision=clip_l14_224(),  # the patches of its second-last layer
        connector="linear",
        decoder=vicuna_13b(norm_eps=1e-6),  # v1.3; 1.5 has 1e-5
    )
    c.parts.vision = "openai/clip-vit-large-patch14"
    c.parts.decoder = c.tokenizer = "lmsys/vicuna-13b-v1.3"
    c.stages = (
        stage(
            "pretrain",
            train="playground/data/LLaVA-CC3M-Pretrain-595K/chat.json",
            images="playground/data/LLaVA-CC3M-Pretrain-595K",
            template="plain",
            groups=CONNECTOR_ONLY,
            samples=128,
            lr=2e-3,
        ),
        stage(
            "finetune",
            train="playground/data/llava_instruct_158k.json",
            images="playground/data/coco/train2014",
            template="vicuna_v1",
            image_placement="random",  # as the paper (equation 2); its later scripts: first
            groups=(("vision/.*", None), (".*", 1.0)),
            samples=128,  # of the script; the README of v1.0.1 has 32
            lr=2e-5,
            epochs=3,
        ),
    )
    c.loss_norm, c.loss_ranks = "rank_mean", 8  # the mean on each of 8 GPUs, then over them
    c.optimizer.clip_norm = None  # its DeepSpeed settings switch clipping off
    c.buckets.lengths, c.buckets.tiles = (320, 640, 1024, 2048), (1,)
    c.data.truncate = True  # as there at model_max_length
    c.remat, c.frozen_dtype = "full", "bfloat16"
    if v.lora:
        adapt(c, rank=64, alpha=16, dropout=0.05, lr=2e-5, connector_lr=2e-5)
    if v.task:
        c.model.vision = clip_l14_336()
        own_data(c, init_from="liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", vocab_size=32_000)
        c.stages[0].image_placement = "first"  # as the scripts of July 2023, which made that model
        c.buckets.lengths = (640, 1024, 2048)
    if v.no_align:
        without(c, "pretrain")
    if v.tiny:
        tiny(c)
    return c
