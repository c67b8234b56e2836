"""LLaVA-1.6 with Mistral 7B, at four times the pixels of 1.5: align the connector, then tune everything.

    python -m vlm_jax.train --config=configs/llava16_mistral.py         # 16 x 80 GB
    python -m vlm_jax.train --config=configs/llava16_mistral.py:tiny    # the same, small enough for a laptop
    python -m vlm_jax.train --config=configs/llava16_mistral.py:task,lora --config.data.train=my.json

The last tunes the released model on your data; add --config.data.images=photos/ if its images lie elsewhere.
Variants: lora (stage 2 by adapters), no_align (stage 2 alone, the ablation), task, tiny; together as in `:tiny,lora`.

Recipe: xiaoachen98/Open-LLaVA-NeXT scripts/v1_6/train/7b (LLaVA never released its own), with LLaVA-NeXT's clipping.
LLaVA-NeXT's archived Mistral scripts have 5e-6 and 2e-5, its later ones 1e-5: --config.stages.finetune.lr=1e-5.
Data where its README puts it: LLaVA-Pretrain (558K captions) and open-llava-next_mix1M.json with the images it names.
Aims for VQAv2 82.2, GQA 64.8, TextVQA 65.7, POPE 86.7, MMMU 35.3, MMBench 68.7.
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import clip_l14_336, llava, mistral_7b
from vlm_jax.recipe import CONNECTOR_ONLY, adapt, anyres, experiment, own_data, stage, tiny, without


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny", "task", "lora", "no_align")
    c = experiment(seed=42)
    c.model = llava(
        vision=clip_l14_336(),  # the patches of its second-last layer
        connector="mlp2x_gelu",
        decoder=mistral_7b(rope_theta=1e6, sliding_window=None),  # Instruct v0.2
        newline=True,
    )
    c.parts.vision = "openai/clip-vit-large-patch14-336"
    c.parts.decoder = c.tokenizer = "mistralai/Mistral-7B-Instruct-v0.2"
    c.images.update(anyres(336))
    c.stages = (
        stage(
            "pretrain",
            train="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            images="playground/data/LLaVA-Pretrain/images",
            template="plain",
            groups=CONNECTOR_ONLY,
            samples=256,
            lr=1e-3,
        ),
        stage(
            "finetune",
            train="playground/data/open-llava-next/open-llava-next_mix1M.json",
            images="playground/data",
            template="mistral_instruct",
            groups=(("vision/.*", 0.1), (".*", 1.0)),  # the tower at 2e-6, as the released configs record
            samples=128,
            lr=2e-5,
        ),
    )
    c.loss_norm, c.loss_ranks = "rank_mean", 32  # the mean on each of 32 GPUs, then over them
    c.optimizer.clip_norm = 1.0  # as LLaVA-NeXT
    c.buckets.lengths, c.buckets.tiles = (2048, 3072, 4096), (5,)  # one image takes at most 2,928 positions
    c.data.truncate = True  # as there at model_max_length
    c.remat, c.frozen_dtype = "full", "bfloat16"
    if v.lora:
        adapt(c, rank=128, alpha=256, dropout=0.05, lr=2e-4, connector_lr=2e-5)  # LLaVA scripts/v1_5/finetune_lora.sh
    if v.task:
        own_data(c, init_from="llava-hf/llava-v1.6-mistral-7b-hf", vocab_size=32_064)
    if v.no_align:
        without(c, "pretrain")
    if v.tiny:
        tiny(c)
    return c
