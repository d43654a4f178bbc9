"""YAML text → nodes with places.

PyYAML's pure-Python parser gives events; the tree is composed here, so that depth and size are capped while it
grows (an alias counts as what it expands to), duplicate keys are faults, and scalars follow YAML 1.2. The C parser
is not used: it crashes on deep nesting. No tag is acted upon, so no text can name code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from attncompiler.errors import Diagnostic, Location, SpecError
from attncompiler.spec.nodes import Entry, Node
from attncompiler.spec.scalars import UNREADABLE, resolve

MAX_BYTES = 256 * 1024
MAX_DEPTH = 64


class _Parser(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """PyYAML's pure-Python reader, scanner and parser, without composer, resolver and constructor."""

    def __init__(self, text: str):
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)


def load(text: str, filename: str) -> tuple[Node, list[Diagnostic]]:
    """The document's root and the faults that did not stop the reading (duplicate keys, tags, keys that are not text).

    Raises SpecError: E002 not YAML, E003 empty, E004 too large or too deep.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(too_large(filename))
    composer = _Composer(text, filename)
    root = composer.document()
    if root is None or root.value is None:
        raise SpecError(Diagnostic("E003", "the document is empty", Location(filename, 1, 1)))
    return root, composer.faults


def load_value(text: str, option: str) -> tuple[Node, list[Diagnostic]]:
    """The value of an override, every place in it being the option. Raises SpecError as `load`; empty text is null."""
    place = Location(option=option)
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(Diagnostic("E004", "the value is too large", place))
    composer = _Composer(text, option, place)
    return composer.document() or Node(None, place), composer.faults


def too_large(filename: str) -> Diagnostic:
    """The fault of a text beyond `MAX_BYTES`."""
    return Diagnostic("E004", f"the spec is larger than {MAX_BYTES // 1024} KiB", Location(filename))


class _Composer:
    """Builds nodes from events. `place` replaces every location, for text that is not in a file."""

    def __init__(self, text: str, filename: str, place: Location | None = None):
        self.filename = filename
        self.place = place
        self.faults: list[Diagnostic] = []
        self.anchors: dict[str, Node | None] = {}
        self.expanded = len(text)
        self.events = self._events(text)

    def _events(self, text: str) -> Iterator[Any]:
        parser = None
        try:
            parser = _Parser(text)
            while parser.check_event():
                yield parser.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            message = ", ".join(part for part in (error.problem, error.context) if part)
            raise self._stop("E002", f"not YAML: {message}", mark) from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            location = self.place or Location(self.filename, line, column)
            message = f"not YAML: the character U+{ord(text[error.position]):04X} is not allowed"
            raise SpecError(Diagnostic("E002", message, location)) from None
        except (ValueError, OverflowError) as error:
            # the scanner leaves numbers in escapes and %YAML directives to int and chr
            raise self._stop("E002", f"not YAML: {error}", parser) from None

    def document(self) -> Node | None:
        """The only document, or None when the stream holds none."""
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        root = self._node(next(self.events), 0)
        next(self.events)  # document end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._stop("E002", "there is more than one document", after.start_mark)
        return root

    def _node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._stop("E004", f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._note("E014", f"tags are not read: {tag!r}", event.start_mark)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: Any, depth: int) -> Node:
        if event.anchor not in self.anchors:
            raise self._stop("E002", f"not YAML: the alias *{event.anchor} has no anchor", event.start_mark)
        node = self.anchors[event.anchor]
        if node is None:
            raise self._stop("E004", f"the alias *{event.anchor} contains itself", event.start_mark)
        if depth + node.height > MAX_DEPTH:
            raise self._stop("E004", f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.expanded += node.size
        if self.expanded > MAX_BYTES:
            message = f"the aliases expand to more than {MAX_BYTES // 1024} KiB"
            raise self._stop("E004", message, event.start_mark)
        return node

    def _scalar(self, event: Any) -> Node:
        value: Any = event.value
        if event.implicit[0]:
            try:
                value = resolve(value)
            except ValueError as error:
                self._note("E014", str(error), event.start_mark)
                value = UNREADABLE
            if value != value:
                self._note("E014", "'.nan' is not a value", event.start_mark)
                value = UNREADABLE
        return Node(value, self._at(event.start_mark), len(event.value) + 1)

    def _sequence(self, event: Any, depth: int) -> Node:
        items = []
        while not isinstance(following := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(following, depth + 1))
        return _container(tuple(items), items, self._at(event.start_mark))

    def _mapping(self, event: Any, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        parts = []
        while not isinstance(following := next(self.events), yaml.MappingEndEvent):
            key, node = self._node(following, depth + 1), self._node(next(self.events), depth + 1)
            parts += [key, node]
            if not isinstance(key.value, str):
                self._note("E011", "a key must be text", following.start_mark, remedy="quote it")
            elif key.value == "<<":
                message = "merge keys ('<<') are YAML 1.1 and not offered"
                self._note("E150", message, following.start_mark, remedy="write the keys out")
            elif key.value in entries:
                first = entries[key.value].key
                given = f" on line {first.line}" if first.line is not None else ""
                self._note("E005", f"the key {key.value!r} was given before{given}", following.start_mark)
            else:
                entries[key.value] = Entry(self._at(following.start_mark), node)
        return _container(entries, parts, self._at(event.start_mark))

    def _at(self, mark: Any) -> Location:
        if self.place is not None or mark is None:
            return self.place or Location(self.filename)
        return Location(self.filename, mark.line + 1, mark.column + 1)

    def _note(self, code: str, message: str, mark: Any, remedy: str | None = None) -> None:
        self.faults.append(Diagnostic(code, message, self._at(mark), remedy))

    def _stop(self, code: str, message: str, mark: Any = None) -> SpecError:
        return SpecError((*self.faults, Diagnostic(code, message, self._at(mark))))


def _container(value: tuple[Node, ...] | dict[str, Entry], parts: list[Node], location: Location) -> Node:
    size = 1 + sum(part.size for part in parts)
    return Node(value, location, size, 1 + max((part.height for part in parts), default=0))
