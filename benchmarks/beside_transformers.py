# ruff: noqa: E402 (threads, cores and large pages are set before jax and torch are imported)
"""A small LLaVA here and in transformers (torch): a train step, and 128 tokens from an image and a prompt.

    python benchmarks/beside_transformers.py [--rounds=5] [--output=beside_transformers.json]

One process, two cores, float32, the same weights (transformers saves them, `vlm_jax.load` opens them) and the same
batch; the sides take turns, the first one changes from round to round, and a figure is the median over the rounds, a
ratio the median of the rounds' ratios. A LLaVA of about 100M parameters: CLIP's ViT-S/14 at 336 px (576 image tokens
a sample) and a Llama of 16 layers, 512 wide.

- train: forward, backward and AdamW (torch's fused one, ours with its state donated), every weight trained; tokens are
  those of the samples. The first losses and the next ones must agree.
- generate: from a picture and a question in memory to 128 greedy token ids, preparation of the picture included. The
  tokens must agree.
- decode: (the time of 128 tokens) - (the time of 1 token), 127 steps; as bandwidth, the bytes of the weights that every
  token must read by these steps per second, beside the better of jax's matrix-vector products in the same rounds.

Exit status 1 where a target of the project is missed: train 1.3 times, generation 2 times, decode 0.7 of the bandwidth.
"""

from __future__ import annotations

import os

from machine import THREADS, cpu_model, on_two_cores, versions

on_two_cores()
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from beside import bare_products, in_turns, ratio, seconds
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vlm_jax
from vlm_jax.data import normalise
from vlm_jax.inference.vlm import Request
from vlm_jax.sharding import make_mesh
from vlm_jax.training.optimizer import make_optimizer, make_schedule
from vlm_jax.training.state import TrainState, init_state, make_train_step

TARGETS = {"train": 1.3, "generate": 2.0, "decode_bandwidth": 0.7}
IMAGE_TOKEN, VOCABULARY = 258, 32_000
VISION = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "hidden_act": "quick_gelu",
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ROWS, QUESTION, ANSWER = 2, 32, 96  # of the training batch: samples, and their tokens of text
LR, WEIGHT_DECAY = 1e-4, 0.01
NEW_TOKENS = 128
PROMPT = "What is in the picture, and what does it tell of the place where it was taken?"


# ------------------------------------------------------------------------------------------------------------ the model


def build(folder: Path) -> tuple[Any, Any]:
    """transformers' model and its processor, saved in `folder`. The weights are drawn larger than they are initialised,
    so that every one matters, and answers vary."""
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
        # No token ends an answer: both sides make all of them.
        eos_token_id=None,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=random)
            if weight.ndim >= 2 and "embedding" not in name:
                fan_in = 1 if "embed_tokens" in name else weight[0].numel()
                weight.copy_(1.5 * draw * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * draw)
            else:
                weight.copy_(0.1 * draw)
    model.generation_config.eos_token_id = None
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # ids 0 to 255
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in ("</s>", "<pad>", "<image>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    size = VISION["image_size"]
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def photograph(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------------- training


def batch() -> dict[str, np.ndarray]:
    """Rows of one image, a question, and an answer that is trained: the arrays of docs/design.md, [1, R, ...]."""
    random = np.random.default_rng(0)
    size = VISION["image_size"]
    places = (size // VISION["patch_size"]) ** 2
    length = places + QUESTION + ANSWER
    tokens = random.integers(300, VOCABULARY - 1, (ROWS, length)).astype(np.int32)
    index = np.full((ROWS, length), -1, np.int32)
    index[:, 8 : 8 + places] = np.arange(places)
    labels = np.full_like(tokens, -100)
    labels[:, -ANSWER - 1 : -1] = tokens[:, -ANSWER:]
    tokens[index >= 0] = 0
    arrays = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (ROWS, length)),
        "segment_ids": np.ones((ROWS, length), np.int32),
        "labels": labels,
        "tiles": np.stack([np.asarray(photograph(i, size, size)) for i in range(ROWS)])[:, None],
        "tile_image": np.zeros((ROWS, 1), np.int32),
        "visual_index": index,
        "visual_inverse": np.broadcast_to(np.arange(8, 8 + places, dtype=np.int32), (ROWS, places)),
    }
    return {name: a[None] for name, a in arrays.items()}


class Ours:
    """Training as `vlm_jax.train` does it."""

    def __init__(self, vlm: vlm_jax.VLM, arrays: Mapping[str, np.ndarray]):
        family = vlm.family
        rates = dict.fromkeys(vlm.params, 1.0)
        schedule = make_schedule("constant", peak=LR, total_steps=1000, warmup=0)
        adamw = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": WEIGHT_DECAY, "clip_norm": None}
        optimizer = make_optimizer(schedule, rates, **adamw, first_moment="float32")
        weigh = functools.partial(family.weigh, norm="global_tokens", ranks=1)
        self.run = make_train_step(family.loss, weigh, optimizer, seed=0, ema_decay=None)
        begin = functools.partial(
            init_state, rates=rates, optimizer=optimizer, frozen_dtype=jnp.dtype("float32"), ema=False
        )
        self.state: TrainState = jax.jit(begin)(vlm.params)
        self.batch = {name: jnp.asarray(a) for name, a in arrays.items()}
        one = {name: a[0] for name, a in self.batch.items()}
        weights = jnp.ones_like(one["labels"], jnp.float32)
        loss = lambda params: family.loss(params, {}, one, weights, None)[0]  # noqa: E731
        see = lambda params: family.bound.bind(params).see(one["tiles"], dtype=jnp.float32)  # noqa: E731
        self._parts = {"vision": jax.jit(see), "forward": jax.jit(loss), "backward": jax.jit(jax.value_and_grad(loss))}
        self.flops = family.costs(rates).of_batch(arrays)

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch)
        return float(metrics["loss"])

    def parts(self) -> dict[str, float]:
        """Seconds of vision, forward, forward and backward, by programs of their own."""
        return {name: seconds(lambda part=part: part(self.state.params)) for name, part in self._parts.items()}


class Theirs:
    def __init__(self, model: Any, arrays: Mapping[str, np.ndarray], mean: Any, std: Any):
        self.model = model
        tokens, index = torch.tensor(arrays["tokens"][0]).long(), torch.tensor(arrays["visual_index"][0])
        labels = torch.tensor(arrays["labels"][0]).long().roll(1, 1)  # transformers shifts them itself
        pixels = normalise(arrays["tiles"][0, :, 0], mean, std).transpose(0, 3, 1, 2)
        self.inputs = {
            "input_ids": torch.where(index >= 0, IMAGE_TOKEN, tokens),
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": torch.tensor(np.ascontiguousarray(pixels)),
            "labels": labels,
        }
        decayed = [w for w in model.parameters() if w.ndim > 1]
        rest = [w for w in model.parameters() if w.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.took: list[tuple[float, float, float]] = []

    def step(self) -> float:
        began = time.perf_counter()
        loss = self.model(**self.inputs).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.took.append((forward - began, backward - forward, time.perf_counter() - backward))
        return loss.item()

    def vision(self) -> None:
        with torch.no_grad():
            self.model.get_image_features(pixel_values=self.inputs["pixel_values"])


# ---------------------------------------------------------------------------------------------------------- measurement


def measure_training(vlm: vlm_jax.VLM, model: Any, rounds: int) -> dict[str, Any]:
    arrays = batch()
    ours, theirs = Ours(vlm, arrays), Theirs(model, arrays, vlm.images.mean, vlm.images.std)
    for _ in range(2):
        losses = ours.step(), theirs.step()
        if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
            raise SystemExit(f"the sides do not train alike: losses {losses}")
    theirs.took.clear()
    took = in_turns({"ours": ours.step, "theirs": theirs.step}, rounds)
    parts = [ours.parts() for _ in range(3)][1:]
    vision = statistics.median([seconds(theirs.vision) for _ in range(3)][1:])
    middle = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    their_parts = [statistics.median(times) for times in zip(*theirs.took[1:], strict=True)]
    tokens = int((arrays["segment_ids"] != 0).sum())
    step = {name: statistics.median(times) for name, times in took.items()}
    return {
        "tokens_per_step": tokens,
        "tokens_per_second": {name: tokens / time_ for name, time_ in step.items()},
        "ratio": ratio(took, "theirs", "ours"),
        "gflops": {name: ours.flops / 1e9 / time_ for name, time_ in step.items()},
        "seconds": {
            "ours": {
                "vision tower, forward": middle["vision"],
                "forward": middle["forward"],
                "backward": middle["backward"] - middle["forward"],
                "AdamW and the rest": step["ours"] - middle["backward"],
                "step": step["ours"],
            },
            "theirs": {
                "vision tower, forward": vision,
                "forward": their_parts[0],
                "backward": their_parts[1],
                "AdamW and the rest": their_parts[2],
                "step": step["theirs"],
            },
        },
    }


def measure_generation(vlm: vlm_jax.VLM, model: Any, processor: Any, rounds: int) -> dict[str, Any]:
    picture = photograph(7)
    request = Request([{"role": "user", "content": f"<image>\n{PROMPT}"}], [picture])
    text = f"USER: <image>\n{PROMPT} ASSISTANT:"

    def our_input() -> Any:
        return dataclasses.replace(vlm.encode(request), stop_ids=(), stop_strings=())

    def ours(tokens: int = NEW_TOKENS) -> np.ndarray:
        return vlm.tokens([our_input()], max_new_tokens=tokens)

    def their_input() -> Any:
        return processor(images=picture, text=text, return_tensors="pt")

    def theirs(tokens: int = NEW_TOKENS) -> np.ndarray:
        inputs = their_input()
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].numpy()

    made = ours(), theirs()
    if made[0].shape != (1, NEW_TOKENS) or not np.array_equal(*made):
        raise SystemExit(f"the sides do not answer alike:\n{made[0]}\n{made[1]}")
    sides = {"ours": ours, "theirs": theirs}
    sides |= {"ours, 1 token": lambda: ours(1), "theirs, 1 token": lambda: theirs(1)}
    sides |= {"ours, input": our_input, "theirs, input": their_input}
    matrix, times = jnp.ones((2048, 16_384)), 8  # larger than any cache
    row, column, product = jnp.ones((1, matrix.shape[0])), jnp.ones((matrix.shape[1], 1)), jax.jit(jnp.matmul)
    sides["row"] = lambda: [product(row, matrix).block_until_ready() for _ in range(times)]
    sides["column"] = lambda: [product(matrix, column).block_until_ready() for _ in range(times)]
    took = in_turns(sides, rounds)
    middle = {name: statistics.median(times) for name, times in took.items()}
    decode = {
        side: statistics.median(np.subtract(took[side], took[f"{side}, 1 token"]).tolist())
        for side in ("ours", "theirs")
    }
    # What every token must read: all of the decoder but the embeddings, of which it reads one row.
    read = sum(a.nbytes for path, a in vlm.params.items() if path.startswith("decoder/") and "embed/" not in path)
    return {
        "prompt_tokens": their_input()["input_ids"].shape[1],
        "distinct_tokens": len(set(made[0][0].tolist())),
        "ratio": ratio(took, "theirs", "ours"),
        "tokens_per_second": {side: NEW_TOKENS / middle[side] for side in decode},
        "decode_tokens_per_second": {side: (NEW_TOKENS - 1) / time_ for side, time_ in decode.items()},
        "decode_ratio": decode["theirs"] / decode["ours"],
        "megabytes_per_token": read / 1e6,
        "matvec_gb_per_s": times * matrix.nbytes / 1e9 / min(middle["row"], middle["column"]),
        "decode_gb_per_s": {side: read * (NEW_TOKENS - 1) / time_ / 1e9 for side, time_ in decode.items()},
        "seconds": {
            side: {
                "picture and prompt to arrays": middle[f"{side}, input"],
                "vision tower and prefill": middle[f"{side}, 1 token"] - middle[f"{side}, input"],
                f"{NEW_TOKENS - 1} steps": decode[side],
                "all": middle[side],
            }
            for side in decode
        },
    }


def table(seconds_of: Mapping[str, Mapping[str, float]], first: str) -> None:
    print(f"  {first:<34}{'vlm_jax':>10}{'torch':>10}")
    for name, ours in seconds_of["ours"].items():
        print(f"  {name:<34}{ours * 1000:>8.0f}ms{seconds_of['theirs'][name] * 1000:>8.0f}ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("beside_transformers.json"))
    parser.add_argument("--only", choices=("train", "generate"), help="one of the two halves")
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    jax.set_mesh(make_mesh(devices=jax.devices()[:1]))
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build(Path(folder))
        vlm = vlm_jax.load(folder, template="vicuna_v1_hf")
    count = sum(w.numel() for w in model.parameters())
    found = {"cpu": cpu_model(), "threads": THREADS, "versions": versions("jax", "torch", "transformers")}
    found |= {"parameters": count, "load_average": os.getloadavg()[0], "rounds": arguments.rounds}
    print(f"{found['cpu']}, {THREADS} cores, float32; " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    print(f"a LLaVA of {count / 1e6:.0f}M parameters; load {found['load_average']:.1f} before the start")
    bare = found["matmul_gflops"] = bare_products(arguments.rounds)
    print(f"bare products of matrices: {bare['jax']:.0f} GF/s jax, {bare['torch']:.0f} torch")
    reached = {}
    if arguments.only != "train":
        made = found["generate"] = measure_generation(vlm, model.eval(), processor, arguments.rounds)
        reached["generate"] = made["ratio"]
        own, most = made["decode_gb_per_s"]["ours"], made["matvec_gb_per_s"]
        reached["decode_bandwidth"] = own / most
        rates, distinct = made["tokens_per_second"], made["distinct_tokens"]
        print(f"\n{NEW_TOKENS} tokens from a picture and {made['prompt_tokens']} tokens: the same, {distinct} distinct")
        print(f"  {rates['ours']:.1f} and {rates['theirs']:.1f} tokens/s: {made['ratio']:.2f} times")
        print(f"  decoding alone: {made['decode_ratio']:.2f} times; a token reads {made['megabytes_per_token']:.0f} MB")
        print(f"  of weights at {own:.1f} GB/s, {own / most:.2f} of the bare matrix-vector product's {most:.1f}")
        table(made["seconds"], "where the time goes")
    if arguments.only != "generate":
        made = found["train"] = measure_training(vlm, model.train(), arguments.rounds)
        reached["train"] = made["ratio"]
        rates, work = made["tokens_per_second"], made["gflops"]
        print(f"\ntraining, {ROWS} samples of {made['tokens_per_step'] // ROWS} tokens a step: the same losses")
        print(f"  {rates['ours']:.0f} and {rates['theirs']:.0f} tokens/s: {made['ratio']:.2f} times")
        print(f"  useful work {work['ours']:.0f} and {work['theirs']:.0f} GF/s")
        table(made["seconds"], "where the time goes")
    found["reached"] = reached
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    missed = [f"{name} {value:.2f} of {TARGETS[name]}" for name, value in reached.items() if value < TARGETS[name]]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
