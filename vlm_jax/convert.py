"""python -m vlm_jax.convert import SRC DST [--template=NAME] [--vision=PATH]
python -m vlm_jax.convert export SRC DST [--format=hf|llava|adapter] [--push=owner/name [--license=NAME]]

`import` writes a Hugging Face or LLaVA checkpoint (a folder, or a hub id owner/name[@revision]) as a model of ours.
`export` writes a workdir or a model of ours for transformers (hf) or LLaVA with LoRA merged, or its LoRA for PEFT.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from vlm_jax.compat import check_versions
from vlm_jax.config import parse_command
from vlm_jax.data.templates import get_template
from vlm_jax.errors import UsageError, run_command, suggest

DIRECTIONS = ("import", "export")
WORDS = {"direction": "import or export", "source": "the model to convert", "target": "a folder that does not exist"}
FLAGS = {
    "format": (("hf", "llava", "adapter"), "hf", "of an export: transformers, the original LLaVA, or PEFT"),
    "push": (str, None, "of an export: where it goes on the hub, owner/name"),
    "license": (str, None, "of a push: what the model card says, such as apache-2.0"),
    "base": (str, None, "of an adapter: the model that it is trained on, if it does not tell"),
    "template": (str, None, "of an import: the conversation template, if the checkpoint does not tell"),
    "vision": (str, None, "of an import: the vision tower, if the checkpoint names it and does not hold it"),
}
OWN = {"import": ("template", "vision", "base"), "export": ("format", "push", "license", "base")}


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, words=WORDS, usage=__doc__ or "")
    if given.direction not in DIRECTIONS:
        raise UsageError(f"{given.direction!r} is not import or export{suggest(given.direction, DIRECTIONS)}")
    for name, (_, default, _) in FLAGS.items():
        if name not in OWN[given.direction] and getattr(given, name) != default:
            raise UsageError(f"--{name} does not belong to {given.direction}")
    if given.template is not None:
        get_template(given.template)
    check_versions()

    from vlm_jax.interop.hub import model_card, origin, push
    from vlm_jax.interop.transfer import export_adapter, export_model, import_model

    began, base = time.monotonic(), given.base
    if given.direction == "import":
        found = import_model(given.source, given.target, template=given.template, vision=given.vision, base=base)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
    elif given.format == "adapter":
        base = export_adapter(given.source, given.target, base=base)
    else:
        export_model(given.source, given.target, layout=given.format)
    print(f"{given.target} is written ({time.monotonic() - began:.0f} s)", file=sys.stderr)
    if given.push is not None:
        told = origin(given.source, base) | {"format": given.format, "license": given.license}
        print(push(given.target, given.push, card=model_card(given.push, **told)))


if __name__ == "__main__":
    run_command(main)
