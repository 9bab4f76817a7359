"""Reader of YAML that people write: every fault has its line and column, and no text costs more
than a moment or some megabytes.

PyYAML alone keeps the last of two equal keys in silence, expands aliases without a bound, and lets
errors of Python pass, such as those of an impossible date.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.error import Mark
from yaml.reader import ReaderError

from pipeline.messages import printable, short

MOST_BYTES = 4 * 2**20
"""Longest text that is read."""
MOST_VALUES = 50_000
"""Largest number of keys and values, each alias counted as what it stands for."""
DEEPEST = 50
"""Largest number of lists and mappings inside of each other."""
BIGGEST = 2**64
"""Whole numbers stay below it, since no library takes larger ones."""
# Errors of PyYAML's functions that turn the text of one value into a value.
_VALUE_ERRORS = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)
_REMEDIES = {
    "mapping values are not allowed": "indent keys alike, and put text with a colon in quotes",
    "cannot start any token": "indent with spaces, and put text with such a beginning in quotes",
    "could not find expected ':'": "put a colon and a space behind the key",
    "expected <block end>": "indent all keys of a mapping alike",
    "expected ',' or": "close the bracket, or put a comma between the entries",
    "end of stream": "close the bracket or the quote",
    "<stream end>": "close the bracket",
    "duplicate anchor": "give one of the two anchors another name",
    "for merging": "name a mapping behind <<",
    "found undefined alias": "name an anchor (&name) that stands before it",
    "could not determine a constructor": "remove the tag that begins with an exclamation mark",
    "but found another document": "keep one document, and remove the lines ---",
    "unknown escape character": "double the backslash, or use single quotes",
}


class YamlError(ValueError):
    """The text is no YAML that can be used; the message has line and column."""


def read_yaml(text: str | bytes) -> Any:
    """Value of a YAML text.

    Raises:
        YamlError: the text is no YAML, holds a key twice, an alias inside of what it names, a date
            or number that does not exist or half of a character; or it is too long or too deep.
    """
    if len(text) > MOST_BYTES:
        raise YamlError(f"it is longer than {MOST_BYTES} bytes: name the right file")
    decoded = _decoded(text) if isinstance(text, bytes) else text
    try:
        return yaml.load(decoded, _Loader)
    except yaml.MarkedYAMLError as error:
        raise YamlError(_explained(error)) from error
    except (ValueError, OverflowError) as error:  # such as of an escape beyond Unicode
        raise YamlError(f"an escape names no character ({error}): correct it") from error
    except ReaderError as error:
        before = decoded[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise YamlError(
            f"{_place(line, column)}: a text cannot hold the character {error.character:#06x}: "
            "remove it"
        ) from error


def write_yaml(value: Any) -> str:
    """YAML text of a value, which `read_yaml` reads back to an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, and without silence about what is lost.

    Attributes:
        depth: number of lists and mappings around the present place.
        height: number of lists and mappings inside of each other, in what was read last.
        num_values: keys and values so far, each alias counted as what it stands for.
        anchored: number of values and height of what each finished anchor names.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.height = self.num_values = 0
        self.anchored: dict[str, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            name = event.anchor
            if name in self.anchors and name not in self.anchored:
                raise _fault(mark, f"the alias *{name} stands inside of what it names: remove it")
            size, height = self.anchored.get(name, (0, 0))
            node = super().compose_node(parent, index)
            self._count(mark, size, height)
            self.height = max(self.height, height)
            return node
        start, outside = self.num_values, self.height
        self.height = 0
        self._count(mark, 1, 0)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        height = self.height + 1
        self.height = max(outside, height)
        if event.anchor is not None:
            self.anchored[event.anchor] = (self.num_values - start, height)
        return node

    def _count(self, mark: Mark, num_values: int, height: int) -> None:
        self.num_values += num_values
        if self.num_values > MOST_VALUES:
            raise _fault(
                mark,
                f"with its aliases the text holds more than {MOST_VALUES} values: write less, or "
                "alias less",
            )
        if self.depth + height > DEEPEST:
            raise _fault(
                mark,
                f"more than {DEEPEST} lists or mappings stand inside of each other: write less",
            )

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault(key_node.start_mark, "a key must be a name or number: correct the key")
            is_merge = key_node.tag.endswith(":merge")
            key = "<<" if is_merge else self.construct_object(key_node)
            mark = key_node.start_mark
            earlier = first.setdefault(key, mark)
            if earlier is not mark:
                remedy = "write <<: [*a, *b]" if is_merge else "keep one of the two"
                raise _fault(
                    mark,
                    f"the key {short(repr(key))} stands in line {earlier.line + 1} already: "
                    f"{remedy}",
                )
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _VALUE_ERRORS as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = {"timestamp": "date", "int": "number", "float": "number"}
            what = kind.get(node.tag.rpartition(":")[2], "value of this kind")
            raise _fault(
                node.start_mark,
                f"{short(repr(node.value))} is no {what}: correct it, or put it in quotes if it "
                "is text",
            ) from error

    def construct_yaml_int(self, node: Any) -> int:
        if re.match(r"[-+]?0[0-9_]|.*:", node.value):
            raise ValueError("read with base 8 or 60, which nobody means")
        number = super().construct_yaml_int(node)
        if abs(number) >= BIGGEST:
            raise ValueError("too large")
        return number

    def construct_yaml_float(self, node: Any) -> float:
        if ":" in node.value:
            raise ValueError("read with base 60, which nobody means")
        number = super().construct_yaml_float(node)
        if math.isinf(number) and "inf" not in node.value.lower():
            raise ValueError("too large")
        return number

    def construct_yaml_str(self, node: Any) -> str:
        text = super().construct_yaml_str(node)
        if "\0" in text:
            raise _fault(node.start_mark, "a text cannot hold the character NUL: remove it")
        if not re.search("[\ud800-\udfff]", text):
            return text
        try:  # JSON writes one character as two halves
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise _fault(
                node.start_mark,
                f"{short(repr(text))} holds half of a character: write the whole character",
            ) from error


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which puts text in quotes that `_Loader` would take for a number."""


# YAML 1.1 takes 1e-5 for text, since it lacks a point; YAML 1.2 and all libraries take a number.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for worker in (_Loader, _Dumper):
    worker.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
for kind in ("int", "float", "str"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", getattr(_Loader, f"construct_yaml_{kind}"))


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise YamlError(
            f"line {line}: the byte {text[error.start]:#04x} is not UTF-8: save the text as UTF-8"
        ) from error


def _fault(mark: Mark, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, mark)


def _explained(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    problem = short(printable(", ".join(filter(None, (error.context, error.problem)))), 300)
    remedy = next((text for words, text in _REMEDIES.items() if words in problem), None)
    if remedy is not None:
        problem += f": {remedy}"
    return problem if mark is None else f"{_place(mark.line + 1, mark.column + 1)}: {problem}"


def _place(line: int, column: int) -> str:
    return f"line {line}, column {column}"
