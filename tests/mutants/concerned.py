"""Which test files to ask about a source file: those that fail first if it is wrong, and then those that could."""

from __future__ import annotations

from collections.abc import Iterator

# A file or folder below src/splice -> the names of test files, without `test_` and `.py`, the likeliest first.
_CONCERNED = {
    "loading/published/vocabulary": "resized combinations published",
    "loading/published/relocating": "relocating published",
    "loading/published": "published relocating report one_road",
    "loading/contributors/token_rows": "tying tree checkpoint one_road",
    "loading/contributors/parameters": "parameters stacked_experts",
    "loading/contributors": "targets tying parameters one_road checkpoint",
    "loading/fingerprint": "fingerprint",
    "loading/other_base": "fingerprint report",
    "loading/base_weight": "fingerprint",
    "loading/saving": "saving save resized fingerprint",
    "loading/in_memory": "in_memory one_road",
    "loading/combining": "combining",
    "loading/creating": "training public_surface targets",
    "loading/state": "one_road in_memory checkpoint",
    "loading/report": "report published",
    "loading/advice": "report errors",
    "loading/tying": "tying",
    "loading/targets": "targets refusals",
    "loading": "report checkpoint errors targets one_road",
    "surgery/merging": "merging mixed_methods dora",
    "surgery/rows": "combinations selection",
    "surgery/replication": "replication",
    "surgery/weight_readers": "fused_parents mha",
    "surgery/layer_attributes": "views layer_commands",
    "surgery/layer_commands": "layer_commands",
    "surgery/base_changes": "lora_inits merging loftq",
    "surgery/calls": "prompts selection",
    "surgery/coexistence": "mixed_methods refusals",
    "surgery/undo": "invariants errors",
    "surgery/isinstance_classes": "public_surface views",
    "surgery/registering": "tree invariants",
    "surgery": "tree selection training invariants",
    "selection": "selection mixed_methods",
    "checkpoint/writing": "save saving",
}
# Asked in the second place, about whatever nobody noticed in the first.
_GENERAL = "errors checkpoint report targets tree saving refusals one_road selection training merging invariants usages"


def concerned(module: str) -> Iterator[str]:
    """Test files for `module` ("loading/plan"), the likeliest first."""
    front = module
    while front not in _CONCERNED:
        front = front.rpartition("/")[0]
    for name in dict.fromkeys(f"{_CONCERNED[front]}".split()):
        yield f"tests/test_{name}.py"


def general(module: str) -> list[str]:
    first = set(concerned(module))
    return [path for path in (f"tests/test_{name}.py" for name in _GENERAL.split()) if path not in first]
