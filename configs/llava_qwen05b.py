"""LLaVA with Qwen1.5 0.5B and SigLIP: the smallest on the hub. Align the connector, then tune everything.

    python -m vlm_jax.train --config=configs/llava_qwen05b.py         # one GPU of 24 GB
    python -m vlm_jax.train --config=configs/llava_qwen05b.py:tiny    # the same, small enough for a laptop
    python -m vlm_jax.train --config=configs/llava_qwen05b.py:task,lora --config.data.train=my.json    # 16 GB of memory

The last tunes the released model on your data; add --config.data.images=photos/ if its images lie elsewhere.
Variants: lora (stage 2 by adapters), no_align (stage 2 alone, the ablation), task, tiny; together as in `:tiny,lora`.

Recipe: LLaVA-VL/LLaVA-NeXT scripts/train/pretrain_siglip.sh and direct_finetune_siglip_a4.sh, on LLaVA-1.5's data where
its README puts it: LLaVA-Pretrain (558K captions) and llava_v1_5_mix665k.json with the images it names.
The released model (llava-interleave) was trained on more, several images and video among it.
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import llava, qwen15_05b, siglip_so400m_384
from vlm_jax.recipe import CONNECTOR_ONLY, adapt, experiment, own_data, stage, tiny, without


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny", "task", "lora", "no_align")
    c = experiment(seed=42)
    c.model = llava(
        vision=siglip_so400m_384(),  # all patches of its second-last layer
        connector="mlp2x_gelu",
        decoder=qwen15_05b(),
    )
    c.parts.vision = "google/siglip-so400m-patch14-384"
    c.parts.decoder = c.tokenizer = "Qwen/Qwen1.5-0.5B-Chat"
    c.images.mode = "resize"
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
            train="playground/data/llava_v1_5_mix665k.json",
            images="playground/data",
            template="qwen_1_5",
            groups=(("vision/.*", 0.2), (".*", 1.0)),  # the tower at 2e-6
            samples=128,
            lr=1e-5,
        ),
    )
    c.optimizer.clip_norm = 1.0  # as LLaVA-NeXT
    c.buckets.lengths, c.buckets.tiles = (800, 1280, 2560), (1,)
    c.data.truncate = True  # as there at model_max_length, which is larger: 8,192 and 32,768
    c.remat, c.frozen_dtype = "full", "bfloat16"
    if v.lora:
        adapt(c, rank=128, alpha=256, dropout=0.05, lr=2e-4, connector_lr=2e-5)  # LLaVA scripts/v1_5/finetune_lora.sh
    if v.task:
        own_data(c, init_from="llava-hf/llava-interleave-qwen-0.5b-hf", vocab_size=152_000)
    if v.no_align:
        without(c, "pretrain")
    if v.tiny:
        tiny(c)
    return c
