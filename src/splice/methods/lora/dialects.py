"""The dialects that LoRA adapters are written in."""

from __future__ import annotations

from splice.checkpoint.dialects import register_dialect
from splice.methods.lora.written.diffusers import DIFFUSERS
from splice.methods.lora.written.kohya import KOHYA
from splice.methods.lora.written.llama_cpp import GGUF

for _dialect in (KOHYA, DIFFUSERS, GGUF):
    register_dialect(_dialect)
