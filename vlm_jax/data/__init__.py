"""Data: from files of records to batches of fixed shapes. `vlm_jax.data.loader.Loader` makes the batches of a run.

record (records, formats, sources) → ids, labels (conversation, templates) and tiles (images, anyres, resize)
→ row (rows) → its place in the run (order; packing, from the sizes in the index) → read in threads and workers
(reading) → batch (loader)
"""

from vlm_jax.data.chat_template import chat_template, template_of
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED, Prompt, encode_conversation, encode_prompt
from vlm_jax.data.formats import parse_record
from vlm_jax.data.images import ImageSettings, normalise, open_image, process
from vlm_jax.data.records import BAD_KINDS, BadRecord, Image, Message, Record
from vlm_jax.data.sources import SourceSpec, open_source, resolve
from vlm_jax.data.templates import TEMPLATES

__all__ = [
    "BAD_KINDS",
    "IMAGE_ID",
    "TEMPLATES",
    "UNTRAINED",
    "BadRecord",
    "Image",
    "ImageSettings",
    "Message",
    "Prompt",
    "Record",
    "SourceSpec",
    "chat_template",
    "encode_conversation",
    "encode_prompt",
    "normalise",
    "open_image",
    "open_source",
    "parse_record",
    "process",
    "resolve",
    "template_of",
]
