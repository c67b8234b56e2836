"""A small LLaVA from scratch that reads handwriting: captions first, then conversations about them.

    python -m vlm_jax.train --config=configs/quickstart.py         # a laptop CPU, a few minutes
    python -m vlm_jax.train --config=configs/quickstart.py:tiny    # a few steps of the same, to see that all of it runs

Data: the 1,797 scans of sklearn's digits, drawn onto canvases of one to four (vlm_jax/data/digits.py states the mixture
of questions). Accuracy is measured on scans that training never saw. Aims for 98 % on "which digit" on single scans
and 90 % over the mixture.
"""

from ml_collections import ConfigDict

from vlm_jax.config import variants
from vlm_jax.models.presets import llama, llava, vit
from vlm_jax.recipe import experiment, stage


def get_config(args: str = "") -> ConfigDict:
    v = variants(args, "tiny")
    c = experiment(seed=0)
    c.model = llava(
        vision=vit(
            image_size=32,
            patch_size=16,  # one cell of the canvas
            hidden_size=256,
            num_layers=1,
            num_heads=8,
            mean=(0.8, 0.8, 0.8),  # the pixels are mostly paper
            std=(0.25, 0.25, 0.25),
        ),
        connector="mlp2x_gelu",
        decoder=llama(
            vocab_size=72,
            hidden_size=160,
            intermediate_size=432,
            num_layers=4,
            num_heads=5,
            tie_embeddings=True,
            qk_norm=True,  # bears the higher learning rate
        ),
    )
    c.tokenizer = "digits:tokenizer"
    c.images.mode = "resize"
    c.data.threads = 1  # the pictures are tiny
    c.stages = (
        stage("align", train="digits:align", template="plain", samples=32, steps=1400, lr=1e-3, warmup=0.05),
        stage(
            "finetune",
            train="digits:train",
            eval="digits:eval",
            template="vicuna_v1",
            samples=24,
            steps=850,
            lr=1e-3,
            warmup=0.05,
        ),
    )
    c.dtype = "float32"  # on a CPU bfloat16 is slower
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip_norm = 1.0
    c.buckets.lengths = (18, 42)  # the longest caption and the longest conversation
    c.buckets.tiles = (1,)
    c.log.every = 50
    c.eval.every = 300
    c.eval.max_samples = 100
    c.eval.batch = 100
    c.eval.max_new_tokens = 16
    c.eval.by = ("kind", "scans")
    c.checkpoint.every = 200
    if v.tiny:
        for one, steps in zip(c.stages, (4, 6), strict=True):
            one.steps, one.samples = steps, 8
        c.eval.every, c.log.every, c.checkpoint.every = 3, 1, 2
    return c
