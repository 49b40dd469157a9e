"""What a checkpoint on disk is called and which version of the format it is written in."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"


# Configs are exchanged with the reference, so what we write names the format's version, not ours.
FORMAT_VERSION = "0.21.2"


SAFETENSORS_NAME = "adapter_model.safetensors"


BIN_NAME = "adapter_model.bin"


# Where it stands in the metadata of a safetensors file.
METADATA_KEY = "splice_base"
