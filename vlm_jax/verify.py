"""python -m vlm_jax.verify [--model=owner/name] [--image=FILE] [--dtype=float32|bfloat16] [--max_new_tokens=N]

Fetches a released checkpoint and compares what it computes here with transformers, where torch is installed, and with
what was recorded of it elsewhere. Prints one table and leaves with status 1 if something differs. A model needs its
memory twice, one time after the other: 4 GB for the default in float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_jax.compat import check_versions
from vlm_jax.config import parse_command
from vlm_jax.errors import VlmError, run_command
from vlm_jax.inference.files import open_file
from vlm_jax.interop.hub import local_folder

FLAGS = {
    "model": (str, "llava-hf/llava-interleave-qwen-0.5b-hf", "a hub id, or a folder in Hugging Face's layout"),
    "image": (str, None, "a photo to ask about, if not the pattern that is made here"),
    "prompt": (str, "What is shown in this image?", "the question"),
    "dtype": (("float32", "bfloat16"), "float32", "of weights and computation, here and in transformers"),
    "max_new_tokens": (int, 32, "length of the answers that are compared"),
}
ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2}  # largest difference of logits, as a share of the largest logit


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the scripts that converted a checkpoint for transformers assert of it, in float16 on a GPU:
    transformers src/transformers/models/llava_next/convert_llava_next_weights_to_hf.py.

    logits: of the first three tokens of the prompt, at the first three of the vocabulary. They stand before the image.
    answer: the begin of the greedy answer about LLaVA's images/llava_v1_5_radar.jpg, which is 1024 x 899.
    """

    template: str
    logits: Sequence[Sequence[float]]
    answer: str


QUESTION, RADAR = "What is shown in this image?", (1024, 899)
HALF = 0.05  # between float16 there and float32 here, for logits up to 11
RECORDED = {
    "llava-v1.6-mistral-7b": Recorded(
        "mistral_instruct",
        ((-4.8555, -4.6992, -0.1996), (-10.5703, -10.7344, -2.7246), (-7.0391, -7.3672, -0.2634)),
        "The image appears to be a radar chart, which is a type of multi-dimensional plot",
    ),
    "llava-v1.6-vicuna-7b": Recorded(
        "llava_v1",
        ((1.4883, 0.9976, -0.6992), (-9.7031, -5.7031, -1.5557), (-5.1328, -5.5586, 8.8281)),
        "The image appears to be a graphical representation of a benchmarking study",
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the table: what is compared with what, how far they are apart, and whether that is right."""

    what: str
    beside: str
    found: str
    right: bool


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, usage=__doc__ or "")
    image = open_file(given.image) if given.image else None
    check_versions()
    folder = local_folder(given.model)

    import vlm_jax

    vlm = vlm_jax.load(folder, dtype=given.dtype)
    count = sum(math.prod(weight.shape) for weight in vlm.params.values())
    print(f"{given.model}: {count:,} parameters, {given.dtype}")
    checks = list(_with_records(vlm, _name(given.model), image, given))
    if find_spec("torch") is not None:
        checks += _with_transformers(vlm, folder, image if image is not None else pattern(), given)
    else:
        print("torch is not installed: not compared with transformers", file=sys.stderr)
    rows = [(check.what, check.beside, check.found, "ok" if check.right else "DIFFERS") for check in checks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    wrong = [f"{check.what} ({check.beside})" for check in checks if not check.right]
    if wrong:
        raise VlmError(f"{given.model} does not compute here what it should: {'; '.join(wrong)}")


def pattern() -> Any:
    """A picture of 640 x 480 with shapes of many sizes and colours, the same everywhere."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:480, :640]
    waves = [np.sin(columns / 37 + rows / 11), np.cos(rows * columns / 9e3), np.sin(columns / 5) * np.cos(rows / 23)]
    return Image.fromarray(np.uint8(127.5 + 127.5 * np.stack(waves, axis=-1)))


def _name(model: str) -> str:
    """Of a checkpoint, without owner, revision and what Hugging Face's conversion appends."""
    return model.rstrip("/").split("/")[-1].partition("@")[0].removesuffix("-hf")


def _with_records(vlm: Any, name: str, image: Any, given: Any) -> Iterator[Check]:
    import numpy as np

    from vlm_jax.data import encode_prompt

    if name not in RECORDED:
        yield Check("logits and answer", "records", "none of this model", True)
        return
    recorded = RECORDED[name]
    messages = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    ids = encode_prompt(messages, recorded.template, tokenizer=vlm.tokenizer).input_ids[None, :3]
    # Attention is causal: what follows, the image too, changes nothing here.
    logits = vlm.apply_hf(input_ids=ids)[0, :, :3]
    apart = float(np.abs(logits - np.array(recorded.logits)).max())
    yield Check("logits before the image", "records", f"{apart:.4f} apart, allowed {HALF}", apart <= HALF)
    if image is None or image.size != RADAR:
        yield Check("answer", "records", "not asked: give --image=llava_v1_5_radar.jpg", True)
        return
    asked, vlm.template = vlm.template, recorded.template
    answer = vlm.generate(QUESTION, images=[image], max_new_tokens=given.max_new_tokens)
    vlm.template = asked
    length = min(len(answer), len(recorded.answer))
    yield Check("answer", "records", repr(answer[:40]), length > 0 and answer[:length] == recorded.answer[:length])


def _with_transformers(vlm: Any, folder: str, image: Any, given: Any) -> Iterator[Check]:
    """Ours are computed before torch loads the model, and let go."""
    import numpy as np
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlm_jax.data import chat_template
    from vlm_jax.inference.vlm import Request, as_messages

    if json.loads((Path(folder) / "config.json").read_text()).get("model_type") not in ("llava", "llava_next"):
        yield Check("logits and answer", "transformers", "it does not read this layout", True)
        return
    processor = AutoProcessor.from_pretrained(folder)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": given.prompt}]}
    jinja = chat_template(vlm.template) or processor.chat_template
    text = processor.apply_chat_template([turn], chat_template=jinja, add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    blind = {**arrays, "pixel_values": np.zeros_like(arrays["pixel_values"])}
    ours, unseen = vlm.apply_hf(**arrays)[0], vlm.apply_hf(**blind)[0]
    encoded = vlm.encode(Request(as_messages(given.prompt, 1), [image])).row
    answer = vlm.generate(given.prompt, images=[image], max_new_tokens=given.max_new_tokens)
    vlm.params = {}

    ids = arrays["input_ids"][0]
    visual = ids == vlm.image_token_id
    shown = encoded["visual_index"].reshape(len(encoded["tokens"]), -1).max(axis=1) >= 0
    same = np.array_equal(shown, visual) and np.array_equal(np.where(visual, 0, ids), encoded["tokens"])
    found = f"{len(encoded['tokens']):,} there, {shown.sum():,} of them the image's; {len(ids):,} here"
    yield Check("tokens of the prompt", "transformers", found, same)

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=given.dtype, trust_remote_code=False).eval()
    floating = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    with torch.no_grad():
        theirs = model(**floating).logits[0].float().numpy()
        more = model.generate(**floating, max_new_tokens=given.max_new_tokens, do_sample=False)
    largest, allowed = float(np.abs(theirs).max()), ALLOWED[given.dtype]
    apart, moved = (float(np.abs(ours - other).max()) / largest for other in (theirs, unseen))
    yield Check("logits", "transformers", f"{apart:.1e} of the largest, allowed {allowed:.0e}", apart <= allowed)
    yield Check("logits", "a black image", f"{moved:.1e} of the largest: it sees", moved > 10 * apart)
    expected = processor.decode(more[0, len(ids) :], skip_special_tokens=True).strip()
    yield Check("answer", "transformers", repr(answer[:40]), answer == expected)


if __name__ == "__main__":
    run_command(main, out_of_memory="choose --dtype=bfloat16, or a smaller --model")
