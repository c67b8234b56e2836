"""Settings of other trainers: the guide shows the table that the command line reads, and every entry can be set.

Run as a script (`make goldens`), it rewrites the tables of the guide.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_jax.coming_from import TABLES, Setting, answer, markdown
from vlm_jax.config import diff_configs, load_config, parse_command
from vlm_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guides" / "coming_from_llava.md"
FIRST = f"### {next(iter(TABLES))}\n"
SPEC = f"{ROOT}/configs/llava16_mistral.py:lora"
ROWS = [row for rows in TABLES.values() for row in rows]

# The fields of LLaVA's argument classes (llava/train/train.py).
LLAVA = """
model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
mm_vision_select_feature
data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio
cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits
lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr group_by_modality_length
""".split()


def test_the_guide_shows_the_tables_of_the_command_line() -> None:
    text = GUIDE.read_text()
    assert text[text.index(FIRST) :] == markdown(), "make goldens"


def test_every_field_of_llava_is_there() -> None:
    assert not set(LLAVA) - {row.theirs for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.theirs)
def test_every_setting_can_be_set_or_says_why_not(row: Setting) -> None:
    if not row.ours.startswith("config."):
        assert not row.example and (row.note or row.ours)
        return
    base, _ = load_config(SPEC)
    changed, _ = load_config(SPEC, [f"--{row.ours}={row.example}"])
    leaf = row.ours.removeprefix("config.")
    assert all(change.path == leaf or change.path.startswith(leaf) for change in diff_configs(base, changed))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora_r=64"], "--lora_r is a flag of LLaVA; here it is --config.model.lora.rank, for example"),
        (["--mm_projector_lr", "2e-5"], "--config.stages.finetune.groups"),
        (["--model_name_or_path", "x/y"], "--config.init_from"),
        (["--per_device_train_batch_size=4"], "config.batch.samples"),
        (["--lora_enable", "True"], "a variant: --config=FILE.py:lora"),
        (["--output_dir=out"], "--workdir=out"),
        (["--bits=4"], "not needed here: no 4-bit"),
        (["--cutoff_len=2048"], "of LLaMA-Factory; here it is --config.buckets.lengths"),
        (["--use-peft"], "of TRL"),
    ],
)
def test_an_old_flag_is_answered_with_ours(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_command(["--config=x.py", *words], {"workdir": (str, None, "")}, config=True)
    assert says in str(error.value)


def test_a_flag_of_nobody_still_names_the_nearest() -> None:
    assert answer("wrokdir", "") is None
    with pytest.raises(UsageError, match="did you mean '--workdir'"):
        parse_command(["--wrokdir=x"], {"workdir": (str, None, "")}, config=True)


if __name__ == "__main__":
    before = GUIDE.read_text()
    GUIDE.write_text(before[: before.index(FIRST)] + markdown())
