"""An extension of griffe, which reads the code for the API reference: comments above fields become their descriptions.

In the code each field of a dataclass or a named tuple has a comment above it that says what it is. The reference shows them
in one table.
"""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Docstring, Extension


class FieldComments(Extension):
    """Adds the comments to the docstring of the class."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        is_tuple = any(str(base) == "NamedTuple" for base in cls.bases)
        if not is_tuple and not any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            return
        fields = [(name, _comment(member)) for name, member in cls.members.items() if _is_field(member)]
        lines = [f"    {name}: {text}" for name, text in fields if text]
        if lines:
            # Its own docstring, which knows how it is to be read, with another text.
            cls.docstring = docstring = cls.docstring or Docstring("", parent=cls)
            front, raises, rest = docstring.value.partition("\nRaises:")
            # Of a named tuple griffe does not know what it is called with.
            fields_section = "\n".join(["Attributes:" if is_tuple else "Args:", *lines])
            docstring.value = f"{front.rstrip()}\n\n{fields_section}\n{raises}{rest}"


def _is_field(member: object) -> bool:
    if not isinstance(member, Attribute) or member.name.startswith("_"):
        return False
    # A value that a class gives to a field of its base has no annotation of its own, and says nothing new.
    line = _lines(member)[member.lineno - 1]  # type: ignore[operator]
    return line.strip().startswith(f"{member.name}:") and "ClassVar" not in line


def _lines(member: Any) -> list[str]:
    return member.lines_collection[member.filepath]


def _comment(field: Any) -> str:
    """The lines of the comment right above a field, as one."""
    above: list[str] = []
    for line in reversed(_lines(field)[: field.lineno - 1]):
        if not line.lstrip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)
