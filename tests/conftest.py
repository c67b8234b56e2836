"""What every test stands on: eight simulated CPU devices, no network, no window, few threads.

The environment is set here, at import, because jax reads it when it is first imported.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

DEVICES = 8
REPOSITORY = Path(__file__).resolve().parents[1]


def xla_flags(devices: int) -> str:
    """Single-threaded products: `pytest -n 2` already fills two cores, and the tests' matrices are tiny. What costs
    time is compiling, so that is done in a hurry; jax 0.11 knows the last flag no more."""
    hurry = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        hurry += " --xla_cpu_use_fusion_emitters=false"
    return f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false {hurry}"


os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(DEVICES),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "WANDB_MODE": "disabled",
    }
)
gc.set_threshold(100_000)  # tracing makes many objects and no garbage: looked for less often, a step is made 1/8 sooner
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cached program would hide a recompilation

import pytest  # noqa: E402

# As the released llava-interleave-qwen-0.5b-hf: roles in ChatML's marks, images before the text.
QWEN_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What `made_llava` has where configs/llava_qwen05b.py has the released model's.
MADE_SIZES = {
    **{f"vision.{name}": size for name, size in (("image_size", 28), ("hidden_size", 24), ("intermediate_size", 40))},
    **{f"vision.{name}": size for name, size in (("num_layers", 2), ("num_heads", 3))},
    **{f"decoder.{name}": size for name, size in (("vocab_size", 264), ("hidden_size", 32), ("num_layers", 2))},
    **{f"decoder.{name}": size for name, size in (("intermediate_size", 48), ("num_heads", 4), ("num_kv_heads", 4))},
    "decoder.head_dim": 8,
    "lora.rank": 4,
}


@pytest.fixture(scope="session")
def made_sizes() -> list[str]:
    """The words of a command that give configs/llava_qwen05b.py:task,lora the sizes of `made_llava`, and few steps."""
    sizes = [f"--config.model.{path}={size}" for path, size in MADE_SIZES.items()]
    run = {"buckets.lengths": "(192,)", "batch.samples": 4, "steps": 3, "remat": "none", "log.tensorboard": False}
    return [*sizes, *(f"--config.{path}={value}" for path, value in run.items())]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ARGS` from the checkout in a process of its own, with `devices` simulated devices.

    For what must not share this process: exit statuses, signals, what an import pulls in.
    """

    def run(
        *args: str | os.PathLike[str], devices: int = 1, timeout: float = 300.0, cwd: Path = REPOSITORY, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags(devices), **environ}
        command = [sys.executable, *map(os.fspath, args)]
        return subprocess.run(
            command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[str]]:
    """Runs a program as `count` processes of one JAX job, one device each: `run(program, *arguments, count=2)`.

    Each gets the arguments, the address to meet at and its own number; returns what each printed. A process that does
    not end well fails the test with its stderr.
    """

    def run(program: str, *arguments: str, count: int = 2) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags(1)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments, address, str(number)],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        printed = []
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            printed.append(out)
        return printed

    return run


@pytest.fixture(scope="session")
def made_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of SigLIP and Qwen2 as transformers writes it, tiny, with the processor of the released one: llava-hf's
    llava-interleave-qwen-0.5b-hf with `MADE_SIZES`. Its weights, in bfloat16, are drawn so large that each matters.
    """
    torch = pytest.importorskip("torch")
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = transformers.Qwen2Tokenizer(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "intermediate_size": 40, "vision_use_head": False}
    text = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 3, **vision},
        text_config={"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, **text, **ends}
        | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = torch.randn(weight.shape, generator=draw)
            narrow = weight.ndim > 1 and "embed" not in name
            scale = 1.5 * weight[0].numel() ** -0.5 if narrow else 0.3
            weight.copy_(scale * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    folder = tmp_path_factory.mktemp("made") / "llava"
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.SiglipImageProcessor(size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=QWEN_CHAT,
    ).save_pretrained(folder)
    return folder
