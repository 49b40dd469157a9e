"""Which test files to ask about a source file: those that fail first if it is wrong, and then those that could."""

from __future__ import annotations

from collections.abc import Iterator

# A file or folder below src/splice -> the names of test files, without `test_` and `.py`, the likeliest first.
_CONCERNED = {
    "loading/published/vocabulary": "resized combinations published",
    "loading/published/relocating": "relocating published combinations",
    "loading/published": "published relocating report one_road loaded_twice tying",
    "loading/contributors/token_rows": "tying tree checkpoint one_road",
    "loading/contributors/parameters": "parameters stacked_experts",
    "loading/contributors/defaults": "targets public_surface warnings training refusals",
    "loading/contributors": "targets tying parameters one_road checkpoint",
    "loading/fingerprint": "fingerprint",
    "loading/other_base": "fingerprint report",
    "loading/base_weight": "fingerprint",
    "loading/saving": "saving save resized fingerprint trained_biases warnings",
    "loading/in_memory": "in_memory one_road empty_adapters",
    "loading/combining": "combining combining_relatives",
    "loading/creating": "training public_surface targets warnings empty_adapters",
    "loading/state": "one_road in_memory checkpoint empty_adapters",
    "loading/kept_config": "kept_config",
    "loading/report": "report published words",
    "loading/advice": "report errors published words",
    "loading/tying": "tying",
    "kinds/targets": "targets refusals parameters",
    "loading/targets": "targets refusals parameters",
    "loading/load": "report checkpoint errors one_road deleted_names loaded_twice usages fingerprint hub",
    "loading": "report checkpoint errors targets one_road",
    "surgery/merging": "merging merged_values merging_some mixed_methods dora tying",
    "surgery/mergeable": "merging merged_values merging_some unreadable",
    "surgery/putting": "merged_values merging merging_some tying computed_weights",
    "surgery/rows": "combinations selection routed_rows mixed_methods",
    "surgery/reading": "read_weights fused_parents",
    "surgery/unmade": "read_weights fused_parents",
    "surgery/replacing": "replaced_base",
    "surgery/replication": "replication",
    "surgery/weight_readers": "fused_parents mha read_weights",
    "surgery/layer_attributes": "views layer_commands",
    "surgery/layer_commands": "layer_commands views",
    "surgery/base_changes": "lora_inits merging loftq",
    "surgery/calls": "prompts selection kept_selections routed_rows alora_caches mixed_methods",
    "surgery/coexistence": "mixed_methods refusals",
    "surgery/undo": "invariants errors",
    "surgery/isinstance_classes": "public_surface views layer_commands",
    "surgery/registering": "tree invariants views deleted_names training",
    "surgery/spellings": "tree training",
    "surgery/attach": "tree invariants views layer_commands training",
    "surgery/generated": "tree made_with_arguments training",
    "surgery/adapted_layer": "tree selection training read_weights replaced_base routed_rows",
    "surgery/tuner": "selection training invariants views deleted_names mixed_methods merging public_surface layer_commands",
    "surgery": "tree selection training invariants",
    "selection": "selection kept_selections mixed_methods routed_rows layer_commands",
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
