"""Checkpoints in and out: every layout is read, every byte comes back, and every misfit is named before anything is
written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax import convert
from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.inference.load import save
from vlm_jax.inference.vlm import Request
from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.huggingface import normal
from vlm_jax.interop.starting import open_start
from vlm_jax.interop.tables import canonical, in_llava_layout
from vlm_jax.interop.transfer import export_model, import_model
from vlm_jax.models import presets
from vlm_jax.sharding import make_mesh

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint as `save_pretrained` writes it, made once for each (kind, tower, decoder)."""
    folders: dict[tuple[str, str, str], Path] = {}

    def make(hf: Any, kind: str, vision: str, text: str) -> Path:
        if (kind, vision, text) not in folders:
            folder = tmp_path_factory.mktemp("hf")
            layer = {"vision_feature_layer": -1 if vision == "siglip" else -2}
            model = hf.build(kind, vision, text, **layer).to(torch.bfloat16)
            model.lm_head.to(torch.float32)  # dtypes may be mixed
            model.save_pretrained(folder, max_shard_size="40KB")
            folders[kind, vision, text] = folder
        return folders[kind, vision, text]

    return make


def rewritten(source: Path, target: Path, rename: Callable[[str], str], **more: Any) -> Path:
    """The checkpoint with its tensors under other names, in one file, and `more` tensors."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    tensors = {rename(n): t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file({**tensors, **more}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def by_hub_name(state: dict[str, Any]) -> dict[str, Any]:
    return {canonical(name): value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[str], str]] = {
    "hub": canonical,
    "memory": lambda name: (
        canonical(name)
        .replace("language_model.lm_head", "lm_head")
        .replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal")
        .replace("image_newline", "model.image_newline")
    ),
    "LLaVA": lambda name: in_llava_layout(canonical(name)),
}


@pytest.mark.parametrize(
    ("kind", "vision", "text"),
    [("llava", "clip", "llama"), ("llava_next", "siglip", "qwen2_tied"), ("llava_next", "clip", "mistral")],
)
def test_every_layout_is_read_and_every_byte_comes_back(
    hf, built, tmp_path: Path, kind: str, vision: str, text: str
) -> None:
    source = built(hf, kind, vision, text)
    state = by_hub_name(hf.state(source))
    assert len({dtype.split()[0] for dtype, _ in state.values()}) == 2
    found = import_model(str(source), tmp_path / "ours")
    export_model(str(tmp_path / "ours"), tmp_path / "back")
    assert hf.state(tmp_path / "back") == state
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    buffer = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(5)}
    for name, rename in LAYOUTS.items():
        other = open_checkpoint(rewritten(source, tmp_path / name, rename, **buffer))
        assert other.config == found.config and set(other.extra) == set(found.extra)
        assert {n: t.read().tobytes() for n, t in other.entries.items()} == {
            n: t.read().tobytes() for n, t in found.entries.items()
        }
    export_model(str(tmp_path / "ours"), tmp_path / "llava", layout="llava")
    import_model(str(tmp_path / "llava"), tmp_path / "ours2")
    export_model(str(tmp_path / "ours2"), tmp_path / "llava2", layout="llava")
    assert by_hub_name(hf.state(tmp_path / "llava")) == state
    assert hf.state(tmp_path / "llava2") == hf.state(tmp_path / "llava")
    assert (tmp_path / "llava2/config.json").read_bytes() == (tmp_path / "llava/config.json").read_bytes()


def test_what_was_imported_is_given_back_after_training_saved_it(hf, built, tmp_path: Path, one_device) -> None:
    """`save` is what the trainer calls: unused weights and settings travel through it."""
    source = built(hf, "llava_next", "clip", "mistral")
    found, vlm = open_checkpoint(source), vlm_jax.load(source, dtype="bfloat16")
    save(
        tmp_path / "run/model",
        vlm.params,
        model=found.config["model"],
        images=found.config["images"],
        template="vicuna_v1",
        tokenizer=hf.no_tokenizer,
        extra=found.extra,
        files={"hf_config.json": found.files["hf_config.json"]},
    )
    export_model(str(tmp_path / "run"), tmp_path / "back")
    state = by_hub_name(hf.state(source))
    head = state.pop("language_model.lm_head.weight")
    back = hf.state(tmp_path / "back")
    assert back.pop("language_model.lm_head.weight")[0] == head[0].replace("float32", "bfloat16")
    assert back == state
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_load_onto_many_devices_reads_the_same_values(hf, built) -> None:
    source = built(hf, "llava_next", "clip", "mistral")
    one, many = ({"devices": jax.devices()[:1]}, {"fsdp": 4, "tensor": 2})
    values = []
    for mesh in (one, many):
        with jax.set_mesh(make_mesh(**mesh)):
            values.append(vlm_jax.load(source).params)
    assert any(not a.sharding.is_fully_replicated for a in values[1].values())
    for path, a in values[0].items():
        assert np.array_equal(np.asarray(a), np.asarray(values[1][path])), path


# ------------------------------------------------------------------------------------------------- a model of our own


@pytest.fixture
def ours(hf, tmp_path: Path, one_device) -> Path:
    """A LLaVA that began here, with LoRA and a tokenizer; every weight is drawn."""
    sizes = {"image_size": 14, "patch_size": 7, "hidden_size": 24, "num_layers": 3, "num_heads": 3}
    decoder = {"vocab_size": 83, "hidden_size": 40, "intermediate_size": 52, "num_layers": 2, "num_heads": 4}
    model = presets.llava(
        vision=presets.clip_vit(**sizes),
        connector="mlp2x_gelu",
        decoder=presets.mistral(**decoder, num_kv_heads=2, sliding_window=None),
        newline=True,
    ) | {"lora": presets.lora(4, 8.0)}
    images = {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": ((28, 28), (14, 42)), "pinpoint_order": "wh"}
    family, random = make_family(model), np.random.default_rng(0)
    params = {
        path: jax.device_put(
            (random.normal(size=a.shape) * (1.2 * a.shape[-2] ** -0.5 if a.ndim > 1 else 0.3)).astype("f4")
        )
        for path, a in family.bound.abstract.items()
    }
    params = {path: a + 1 if path.endswith("scale") else a for path, a in params.items()}
    from vlm_jax.data.sources import resolve
    from vlm_jax.inference.load import open_tokenizer

    tokenizer = open_tokenizer(str(resolve("digits:tokenizer_chat")[0]))
    save(tmp_path / "ours", params, model=model, images=images, template="vicuna_v1", tokenizer=tokenizer)
    return tmp_path / "ours"


def test_transformers_answers_as_we_do_from_the_export(hf, ours: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

    vlm = vlm_jax.load(ours)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (31, 17, 3), dtype=np.uint8))
    one = vlm.encode(Request([{"role": "user", "content": "<image>\nWhat is the sum?"}], [image]))
    tokens = vlm.tokens([one], max_new_tokens=12)[0]
    tokens = tokens[tokens >= 0]
    convert.main(["export", str(ours), str(tmp_path / "hf")])
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    token = model.config.image_token_index
    assert tokenizer.convert_tokens_to_ids("<image>") == token == 83 and model.config.text_config.vocab_size == 128
    row = one.row
    ids = np.where(row["visual_index"] >= 0, token, row["tokens"])
    mean, std = (np.array(getattr(vlm.images, name)) for name in ("mean", "std"))
    pixels = ((row["tiles"] / 255 - mean) / std).transpose(0, 3, 1, 2).astype("f4")
    given = {
        "input_ids": ids[None].astype("i8"),
        "attention_mask": np.ones((1, len(ids)), "i8"),
        "pixel_values": pixels[None],
        "image_sizes": np.array([[31, 17]]),
    }
    with torch.no_grad():
        logits = model(**hf.torch(given)).logits.numpy()
        made = model.generate(**hf.torch(given), max_new_tokens=len(tokens), do_sample=False)[0, len(ids) :]
    mine = vlm.apply_hf(**given)  # adapters apart, where the export has merged them
    assert np.abs(mine - logits[..., :83]).max() <= 1e-4 * np.abs(mine).max()
    assert made.tolist() == tokens.tolist() and len(set(tokens.tolist())) > 2
    assert "USER" in (tmp_path / "hf/chat_template.jinja").read_text()
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).exists()

    # The same through LLaVA's layout, which has no added rows: it comes back with the embedding that it had.
    import_model(str(tmp_path / "hf"), tmp_path / "again")
    export_model(str(tmp_path / "again"), tmp_path / "llava", layout="llava")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert (config["vocab_size"], config["image_grid_pinpoints"]) == (83, [[28, 28], [14, 42]])
    assert "<image>" not in (tmp_path / "llava/tokenizer.json").read_text()
    assert np.abs(vlm_jax.load(tmp_path / "llava").apply_hf(**given) - mine).max() <= 1e-4 * np.abs(mine).max()


# --------------------------------------------------------------------------------------------------------------- parts


def test_a_llava_starts_from_a_tower_and_a_decoder(hf, tmp_path: Path, one_device) -> None:
    import transformers

    sizes = {key: value for key, value in hf.vision["clip"].items() if key != "model_type"}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=sizes, text_config=text))
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**hf.text("qwen2_tied")))
    hf.enlarge(clip).save_pretrained(tmp_path / "clip")
    hf.enlarge(qwen).to(torch.float16).save_pretrained(tmp_path / "qwen")
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 3}
    decoder = {"vocab_size": 66, "hidden_size": 40, "intermediate_size": 52, "num_layers": 2, "num_heads": 4}
    model = presets.llava(
        vision=presets.clip_vit(image_size=14, patch_size=7, **vision),
        connector="linear",
        decoder=presets.qwen2(**decoder, num_kv_heads=2, rope_theta=1e4),
    )
    abstract = make_family(model).bound.abstract
    parts = {"vision": str(tmp_path / "clip"), "connector": None, "decoder": str(tmp_path / "qwen")}
    start = open_start(None, parts, model, abstract)
    loaded = start.load()
    assert set(abstract) - set(loaded) == {path for path in abstract if path.startswith("connector/")}
    # One layer less than the tower has, and a head of its own, both told.
    assert [note.split(str(tmp_path))[-1] for note in start.notes] == [
        "/clip goes on above its layer 2, which is left out",
        "/qwen is its embedding: here it becomes one of its own",
    ]
    kernel = clip.vision_model.encoder.layers[1].mlp.fc1.weight.detach().numpy()
    assert np.array_equal(np.asarray(loaded["vision/layers/mlp/up/kernel"])[1], kernel.T)
    assert np.array_equal(np.asarray(loaded["decoder/lm_head/kernel"]), np.asarray(loaded["decoder/embed/embedding"]).T)
    assert any("post_layernorm" in name for name in start.extra)
    model["decoder"]["vocab_size"] = 64
    with pytest.raises(UsageError, match=r"has 66 rows.*set --config\.model\.decoder\.vocab_size=66"):
        open_start(None, parts, model, make_family(model).bound.abstract)
    with pytest.raises(UsageError, match=r"holds a vision alone.*config\.parts\.vision"):
        open_checkpoint(tmp_path / "clip")


# -------------------------------------------------------------------------------------------------------------- errors


def test_every_misfit_is_named_and_nothing_is_written(hf, built, tmp_path: Path) -> None:
    source = built(hf, "llava", "clip", "llama")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in source.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    shards = sorted(bad.glob("*.safetensors"))
    index = json.loads((bad / "model.safetensors.index.json").read_text())
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    tensors = load_file(shards[0])
    (gone, wide, *_), others = sorted(tensors), load_file(shards[2])
    tensors[wide] = torch.zeros(3, 5)
    del tensors[gone]
    tensors["model.stray.weight"] = torch.zeros(2)
    tensors[next(iter(others))] = next(iter(others.values()))
    save_file(tensors, shards[0], metadata={"format": "pt"})
    with pytest.raises(UsageError) as error:
        import_model(str(bad), tmp_path / "ours")
    told = str(error.value)
    for says in (
        f"missing {gone}, which the index places in {shards[0].name}",
        f"{wide} is [3, 5], expected [",
        "left over model.stray.weight",
        f"duplicate {next(iter(others))}, in {shards[0].name} and {shards[2].name}",
        f"the weight file {shards[1]} is damaged",
    ):
        assert says in told
    assert told.count("\n") == 5 and not (tmp_path / "ours").exists()
    assert index["weight_map"][gone] == shards[0].name


def test_a_conversion_that_fails_leaves_the_target_alone(hf, built, tmp_path: Path, monkeypatch) -> None:
    source = built(hf, "llava", "clip", "llama")
    from vlm_jax.interop import native

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(native, "write_shards", fail)
        import_model(str(source), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for says, *words in (
        ("is not empty", "import", str(source), str(tmp_path / "mine")),
        ("did you mean 'export'", "exprt", str(source), str(tmp_path / "x")),
        ("--format does not belong to import", "import", str(source), str(tmp_path / "x"), "--format=llava"),
        ("unknown template", "import", str(source), str(tmp_path / "x"), "--template=vicuna_v2"),
        ("does not exist", "export", str(tmp_path / "none"), str(tmp_path / "x")),
    ):
        with pytest.raises(UsageError, match=says):
            convert.main(words)
    vlm = vlm_jax.load(source)
    with pytest.raises(UsageError, match="without a tokenizer"):
        vlm.generate("What?")
    with pytest.raises(UsageError, match="2 image tokens, but its images have 4"):
        vlm.apply_hf(input_ids=np.array([[1, 61, 61]]), pixel_values=np.zeros((1, 3, 14, 14), "f4"))
    assert normal(vlm.family.settings)["lora"] is None
