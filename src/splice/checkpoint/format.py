"""What a checkpoint on disk is called and which version of the format it is written in."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"

# Configs are exchanged with the reference, so what we write names the format's version, not ours.
FORMAT_VERSION = "0.21.2"

# Preferred where both are there: it cannot run code, and its header can be read alone.
SAFETENSORS_NAME = "adapter_model.safetensors"

# A pickle, of older adapters.
BIN_NAME = "adapter_model.bin"

# Where the fingerprint of the base stands in the metadata of a safetensors file. Other readers pass over it; a field of the
# config would make the reference warn of an unknown one.
METADATA_KEY = "splice_base"
