"""A tiny tokenizer and data sets of a few records, made in code."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WORDS = r"\n|[\w']+|[^\w\s]"
TEXT = """A chat between a curious user and an artificial intelligence assistant . The gives helpful , detailed polite
answers to the user's questions USER : ASSISTANT What is this ? It And that Yes No cat dog 0 1 2 3 4 5 6 7 8 9"""


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per word; a BOS first."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", "\n", *TEXT.split()])
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """The tokenizer of Mistral 7B v0.1, a sentencepiece one of 32,000 tokens, in its legacy behaviour or the new."""
    from transformers import LlamaTokenizer

    package = importlib.util.find_spec("mistral_common")
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(package.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return functools.cache(lambda legacy: LlamaTokenizer.from_pretrained(folder, legacy=legacy))


def conversation(*turns: str) -> list[dict[str, str]]:
    """LLaVA turns, the user's first."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes `count` records, each with `images(i)` images of one colour and a question as long as `words(i)`."""

    def make(
        count: int,
        name: str = "set",
        images: Callable[[int], int] = lambda i: 1,
        words: Callable[[int], int] = lambda i: 1 + i % 4,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        records = []
        for i in range(count):
            files = [f"{i}-{j}.png" for j in range(images(i))]
            for j, file in enumerate(files):
                Image.fromarray(np.full((8, 8, 3), 10 * i + j, np.uint8)).save(folder / file)
            question = "<image>" * len(files) + "What " * words(i) + "?"
            records.append({"id": f"{name}-{i}", "image": files, "conversations": conversation(question, str(i % 10))})
        file = folder / f"{name}.json"
        file.write_text(json.dumps(records))
        return file

    return make
