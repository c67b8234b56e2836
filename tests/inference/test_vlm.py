"""What is answered: not by the batch, the bucket, the mesh or the cache, but by the weights and the question."""

from __future__ import annotations

import dataclasses
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from vlm_jax.data.records import BadRecord
from vlm_jax.data.rows import PREFIX_FUSION, collate
from vlm_jax.errors import UsageError
from vlm_jax.inference.vlm import VLM, Request, as_messages
from vlm_jax.models.generation import sample
from vlm_jax.models.sampling import GREEDY, Sampling
from vlm_jax.sharding import RULES, make_mesh, place

NEW = 12
WARM = Sampling(temperature=1.5, top_p=0.95)


def question(text: str, *images: Any, seed: int = 0) -> Request:
    return Request(as_messages(text, len(images)), images, seed=seed)


def both(vlm: VLM, requests: list[Request], sampling: Sampling = GREEDY) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [N, NEW], logits float32 [N, V] of the first of them), by one and the same program."""
    encoded = [vlm.encode(one) for one in requests]
    state, seeds, first, logits = vlm._start(encoded, 1, NEW, sampling)
    _, rest = vlm._go_on(state, seeds, NEW - 1, 16, encoded[0], sampling)
    return np.concatenate([first, rest], axis=1)[: len(requests), :NEW], np.asarray(logits)[: len(requests)]


@pytest.fixture(scope="session")
def mixed(picture: Callable[[int], np.ndarray]) -> list[Request]:
    """Requests of different lengths with 0, 1 and 2 images; they fill one batch of the largest bucket here."""
    return [
        question("Why?"),
        question("What is this, then?", picture(1), seed=1),
        question("<image> or <image>: which of the two do you like more?", picture(2), picture(3), seed=2),
        question("Is it?", picture(4), seed=3),
    ]


@pytest.fixture(scope="session")
def greedy(vlm: VLM, mixed: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Their greedy tokens and first logits."""
    return both(vlm, mixed)


@pytest.fixture(scope="session")
def drawn(vlm: VLM, mixed: list[Request]) -> np.ndarray:
    """Their drawn tokens."""
    return both(vlm, mixed, WARM)[0]


def test_the_tiny_model_reacts_to_its_inputs(
    vlm: VLM, mixed: list[Request], picture: Callable[[int], np.ndarray]
) -> None:
    asked = [question(text, picture(number)) for text, number in [("Why?", 1), ("Why?", 2), ("Who?", 1)]]
    a, other_image, other_text = both(vlm, [*asked, mixed[2]])[1][:3]
    assert np.abs(a - other_image).max() > 0.1
    assert np.abs(a - other_text).max() > 0.1


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(
    vlm: VLM, mixed: list[Request], greedy: tuple[np.ndarray, np.ndarray], drawn: np.ndarray
) -> None:
    # 1e-5: float32 sums over other lengths may be grouped differently.
    for one, tokens, logits in zip(mixed, *greedy, strict=True):
        alone_tokens, alone_logits = both(vlm, [one])
        np.testing.assert_allclose(alone_logits[0], logits, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(alone_tokens[0], tokens)
    assert (drawn != greedy[0]).any()
    np.testing.assert_array_equal(both(vlm, mixed[::-1], WARM)[0][::-1], drawn)


def test_greedy_tokens_are_those_of_the_full_forward_without_a_cache(
    vlm: VLM, mixed: list[Request], greedy: tuple[np.ndarray, np.ndarray]
) -> None:
    tokens = greedy[0]
    encoded = [vlm.encode(one) for one in mixed]
    budgets = {"T": 160, "K": 2, "P": vlm.family.features_per_tile, "H": 8, "W": 8}
    arrays = collate([one.row for one in encoded], PREFIX_FUSION, budgets)
    lengths = [len(one.row["tokens"]) for one in encoded]
    assert max(lengths) + NEW <= 160 and min(lengths) > 24  # the sliding window is shorter than any prompt
    rows = np.arange(len(encoded))

    @jax.jit
    def full(params: Any, batch: Any) -> jax.Array:
        model = vlm.family.bound.bind(params)
        return jnp.argmax(model.decoder.logits(model(batch)[0]), axis=-1)

    for step in range(NEW):
        ends = np.array(lengths) + step
        with jax.set_mesh(vlm.mesh):
            batch = {name: place(a, vlm.mesh, P(RULES.batch)) for name, a in arrays.items()}
            following = np.asarray(full(vlm.params, batch))[rows, ends - 1]
        going = tokens[:, step] >= 0
        np.testing.assert_array_equal(following[going], tokens[going, step])
        arrays["tokens"][rows, ends], arrays["positions"][rows, ends] = following, ends
        arrays["segment_ids"][rows, ends] = 1


ANYRES = {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": ((16, 8), (8, 16), (16, 16))}


@pytest.mark.parametrize("images", [ANYRES, {**ANYRES, "max_tiles": 1, "several": "pad"}], ids=["anyres", "anyres_max"])
def test_images_of_any_sizes_are_asked_about_together(make_vlm: Callable[..., VLM], images: dict[str, Any]) -> None:
    vlm = make_vlm(images=images)
    rng = np.random.default_rng(0)
    wide, high, large, small = (
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in [(40, 20), (11, 30), (90, 80), (3, 3)]
    )
    asked = [question("Why?"), question("Why?", wide), question("Why?", high), question("Why?", large, small)]
    together = vlm.logits(asked)
    before = vlm.compiled.copy()
    for one, logits in zip(asked[1:3], together[1:3], strict=True):  # 1e-5: see above
        np.testing.assert_allclose(vlm.logits([one])[0], logits, rtol=0, atol=1e-5)
    assert vlm.compiled - before == {"prefill": 1}  # both have three tiles
    assert [vlm.encode(question("Why?", image)).bucket[1] for image in (wide, large)] == [4, 5]
    assert np.abs(together[1] - together[2]).max() > 0.1
    newline = vlm.with_params({**vlm.params, "newline": -vlm.params["newline"]}).logits(asked)
    moved = np.abs(newline - together).max(1)
    assert moved[0] < 1e-5 and moved[1:].min() > 0.01


@pytest.mark.parametrize("mesh", [{"devices": 8}, {"devices": 2, "fsdp": 1, "tensor": 2}], ids=["fsdp=8", "tensor=2"])
def test_a_mesh_answers_as_one_device_does(
    make_vlm: Callable[..., VLM],
    mixed: list[Request],
    greedy: tuple[np.ndarray, np.ndarray],
    drawn: np.ndarray,
    mesh: dict[str, int],
) -> None:
    tokens, logits = both(make_vlm(**mesh), mixed, WARM)
    np.testing.assert_allclose(logits, greedy[1], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(tokens, drawn)


def test_one_compilation_per_bucket(vlm: VLM, picture: Callable[[int], np.ndarray]) -> None:
    before = vlm.compiled.copy()
    vlm.answer([question("Why?", picture(1))], max_new_tokens=5)
    assert vlm.compiled - before == {"prefill": 1, "decode": 1}
    vlm.answer([question("Who is it?", picture(2))], max_new_tokens=8)  # another prompt, another limit
    vlm.answer([question("Why?", seed=-3)], max_new_tokens=6)  # no image, another seed
    other = vlm.with_params({path: 2 * value for path, value in vlm.params.items()})
    other.answer([question("Why?", picture(1))], max_new_tokens=7)
    assert vlm.compiled - before == {"prefill": 1, "decode": 1}
    vlm.tokens([vlm.encode(question("Why? " * 40))], max_new_tokens=1)
    assert vlm.compiled - before == {"prefill": 2, "decode": 1}


def test_no_more_than_max_new_tokens(vlm: VLM, mixed: list[Request], greedy: tuple[np.ndarray, np.ndarray]) -> None:
    encoded = [vlm.encode(one) for one in mixed]
    for limit in (1, 9, 11):
        np.testing.assert_array_equal(vlm.tokens(encoded, max_new_tokens=limit), greedy[0][:, :limit])


def test_a_row_ends_with_its_stop_and_the_others_go_on(
    vlm: VLM, mixed: list[Request], greedy: tuple[np.ndarray, np.ndarray]
) -> None:
    free = greedy[0]
    stops = (int(free[1, 4]), int(free[2, 0]))
    encoded = [dataclasses.replace(vlm.encode(one), stop_ids=stops) for one in mixed]
    ends = []
    for found, row in zip(vlm.tokens(encoded, max_new_tokens=NEW), free, strict=True):
        end = min([i + 1 for i, token in enumerate(row) if token in stops] or [NEW])
        np.testing.assert_array_equal(found[:end], row[:end])
        assert (found[end:] == -1).all()
        ends.append(end)
    assert ends[2] == 1 and len(set(ends)) > 1


def test_the_text_of_an_answer_ends_before_its_stop(vlm: VLM) -> None:
    one = vlm.encode(question("Why?"))
    (end,) = vlm.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert end in one.stop_ids
    assert vlm._text([*vlm.tokenizer("A cat")["input_ids"], end, *vlm.tokenizer("!")["input_ids"], -1], one) == "A cat"


# ---------------------------------------------------------------------------------------------------------- sampling


def draws(logits: list[float], sampling: Sampling) -> np.ndarray:
    """How often each token is drawn, by rows that differ in their seed alone."""
    count = 4000
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        rows = jnp.broadcast_to(jnp.array(logits, jnp.float32), (count, len(logits)))
        drawn = sample(rows, jnp.arange(count, dtype=jnp.uint32), jnp.full(count, 5), sampling)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / count


def test_tokens_are_drawn_with_their_probability() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 3.0):
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        spread = np.sqrt(p * (1 - p) / 4000)
        assert (np.abs(draws(logits.tolist(), Sampling(temperature)) - p) < 4 * spread).all()


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = np.log([0.1, 0.5, 0.3, 0.1]).tolist()
    for top_p, kept in [
        (0.0, [1]),
        (0.3, [1]),
        (0.6, [1, 2]),
        (0.79, [1, 2]),
        (0.85, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ]:
        found = draws(logits, Sampling(1.0, top_p))
        assert np.flatnonzero(found).tolist() == kept, top_p
    found = draws(logits, Sampling(1.0, 0.6))
    np.testing.assert_allclose(found[1:3], [0.625, 0.375], atol=4 * np.sqrt(0.625 * 0.375 / 4000))


def test_a_seed_repeats_an_answer_and_another_changes_it(
    vlm: VLM, mixed: list[Request], picture: Callable[[int], np.ndarray]
) -> None:
    asked = [question("Why?", picture(1), seed=seed) for seed in (1, 1, 2)]
    first, again, other = both(vlm, [*asked, mixed[2]], WARM)[0][:3]
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_p": -0.1}]
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="give"):
        Sampling(**wrong)


# ---------------------------------------------------------------------------------------------------------- streaming


def test_a_stream_says_what_the_batch_says(vlm: VLM, mixed: list[Request]) -> None:
    for limit in (NEW, 9):
        whole = vlm.answer(mixed[:1], max_new_tokens=limit)[0]
        assert "".join(vlm.stream(mixed[0], max_new_tokens=limit)) == whole


@dataclasses.dataclass
class Script:
    """Stands for the device: gives these tokens, a few at a time."""

    tokens: list[int]
    done: np.ndarray = dataclasses.field(default_factory=lambda: np.array([False]))

    def install(self, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: Any) -> Any:
            return self, None, np.array([self.tokens[:1]]), None

        def go_on(script: Script, seeds: Any, limit: int, steps: int, *_: Any) -> Any:
            return Script(script.tokens[limit:], np.array([len(script.tokens) <= limit + 1])), np.array(
                [script.tokens[1 : limit + 1]]
            )

        monkeypatch.setattr(vlm, "_start", start)
        monkeypatch.setattr(vlm, "_go_on", go_on)


@pytest.mark.parametrize("text", ["Zwölf Kätzchen – 猫 🎉 fin", "  a\n\n b  \n", "�?", "é", "", "half\ud83d"])
def test_a_piece_never_ends_within_a_character(vlm: VLM, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tokens = vlm.tokenizer(text.encode("utf-8", "ignore").decode())["input_ids"]
    (end,) = vlm.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    Script([*tokens, end]).install(vlm, monkeypatch)
    pieces = list(vlm.stream(question("Why?"), max_new_tokens=99))
    expected = text.encode("utf-8", "ignore").decode().strip()
    assert "".join(pieces) == expected
    assert all(piece and "\ufffd" not in piece.replace(expected, "") for piece in pieces if expected != "�?")


def test_a_stream_that_ends_within_a_character_says_so(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(vlm.tokenizer("ab猫")["input_ids"]).install(vlm, monkeypatch)
    assert "".join(vlm.stream(question("Why?"), max_new_tokens=4)) == vlm.tokenizer.decode(
        vlm.tokenizer("ab猫")["input_ids"][:4]
    )


def test_a_stop_of_several_tokens_is_never_shown(make_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make_vlm(template="plain")  # stops at a newline, which is no token by this name
    Script(vlm.tokenizer("a cat\nand more")["input_ids"]).install(vlm, monkeypatch)
    one = vlm.encode(Request(as_messages("say", 0)))
    assert one.stop_strings[0] == "\n"
    assert "".join(vlm.stream(Request(as_messages("say", 0)), max_new_tokens=99)) == "a cat"
    assert vlm._text(vlm.tokenizer("a cat\nand more")["input_ids"], one) == "a cat"
    monkeypatch.setattr(vlm, "encode", lambda request: dataclasses.replace(one, stop_strings=("###",)))
    Script(vlm.tokenizer("a # b ## c### d")["input_ids"]).install(vlm, monkeypatch)
    assert "".join(vlm.stream(Request(as_messages("say", 0)), max_new_tokens=99)) == "a # b ## c"


# ---------------------------------------------------------------------------------------------- questions and images


def test_every_form_of_a_question_is_the_same_question(
    vlm: VLM, picture: Callable[[int], np.ndarray], tmp_path
) -> None:
    pixels = picture(1)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = {"type": "text", "text": "Why?"}
    expected = vlm.generate("Why?", [pixels], max_new_tokens=NEW)
    for prompt, images in [
        ("<image>\nWhy?", [image]),
        ("Why?", image),
        ("Why?", [buffer.getvalue()]),
        ("Why?", [tmp_path / "a.png"]),
        ([{"role": "user", "content": [{"type": "image"}, text]}], [image]),
        ([{"role": "user", "content": [{"type": "image", "image": image}, text]}], []),
        ([{"from": "human", "value": "<image>\nWhy?"}], [image]),
    ]:
        assert vlm.generate(prompt, images, max_new_tokens=NEW) == expected
    assert vlm.answer([], max_new_tokens=4) == []


def test_named_and_given_images_go_to_their_places(
    vlm: VLM, mixed: list[Request], picture: Callable[[int], np.ndarray]
) -> None:
    def parts(*images: Any) -> list[dict[str, Any]]:
        shown = [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": "Which?"}]}]

    a, b = picture(1), picture(2)
    asked = [Request(parts(None, b), [a]), Request(parts(a, b)), Request(parts(None, None), [b, a])]
    mixed_up, plain, other = both(vlm, [*asked, mixed[2]])[1][:3]
    np.testing.assert_allclose(mixed_up, plain, atol=1e-5)
    assert np.abs(plain - other).max() > 1e-2


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("<image> and <image>?", 1, "2 place(s) <image>, but 1 image"),
        ([{"role": "user", "content": "Why?"}], 1, "0 place(s) for the 1 image"),
        ([{"role": "user", "content": "<image>Why?"}], 0, "1 place(s) for the 0 image"),
        ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], 0, "the last message"),
        ([{"role": "usr", "content": "Why?"}], 0, "did you mean 'user'"),
        ("half \ud83d", 0, "half a character"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(vlm: VLM, picture: Any, prompt: Any, images: int, says: str) -> None:
    with pytest.raises(BadRecord) as error:
        vlm.generate(prompt, [picture(i) for i in range(images)])
    assert says in str(error.value)


def test_missing_and_broken_images_are_named(vlm: VLM, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    for image, says in [
        (tmp_path / "a.png", "is not a JPEG"),
        (tmp_path / "b.png", "there is no image"),
        (b"x", "not a"),
    ]:
        with pytest.raises(UsageError, match=says):
            vlm.generate("Why?", [image])
    with pytest.raises(UsageError, match="URL"):
        vlm.generate("Why?", ["http://localhost/a.png"])


def test_old_weights_are_not_kept(make_vlm: Callable[..., VLM]) -> None:
    old = make_vlm()
    watched = weakref.ref(old.params["decoder/embed/embedding"])
    new = old.with_params(make_vlm(seed=1).params)
    del old  # but not what it compiled, which the new one has
    gc.collect()
    assert watched() is None and new.params
