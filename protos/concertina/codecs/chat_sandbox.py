"""A sandbox for Jinja whose templates end: what they do and make is counted, and limited.

Jinja's own sandbox keeps templates from reaching Python. It does not keep them from looping, nor
from making strings that no memory holds, since a thread cannot be stopped from outside.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_LEAST: Final = 1 << 20
_FOR_EACH_CHARACTER: Final = 32
_LIMIT_S: Final = 2.0
_TURN: Final = 8  # a turn of a loop counts as so many characters
_LARGEST_NUMBER: Final = 1000  # as an argument: widths, counts, levels
_WIDE: Final = re.compile(r"[0-9]{4,}|\*|\{[^}]*\{")
_FILTERS: Final = frozenset(
    {
        *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape"),
        *("first", "float", "groupby", "indent", "int", "items", "join", "last", "length"),
        *("list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse"),
        *("round", "safe", "select", "selectattr", "slice", "sort", "string", "sum", "title"),
        *("tojson", "trim", "unique", "upper", "urlencode", "wordcount", "attr", "forceescape"),
        "format",
    }
)
_current = threading.local()


class TemplateSpent(Exception):
    """A template that loops, or makes too much. The message goes on after its name."""


class Budget:
    """What one rendering may make, and until when. In force inside `with`, for one thread.

    left: characters, items and turns of loops.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self._ends_at = 0.0

    @classmethod
    def of(cls, characters: int) -> Budget:
        """The budget for messages of so many characters."""
        return cls(_LEAST + _FOR_EACH_CHARACTER * characters)

    def spend(self, amount: int) -> None:
        """Count what is made now. Raises TemplateSpent."""
        self.left -= amount
        if self.left < 0:
            raise TemplateSpent("makes more than can be of use: does it loop?")
        if time.thread_time() > self._ends_at:
            raise TemplateSpent(f"takes more than {_LIMIT_S:g} s: does it loop?")

    def __enter__(self) -> Self:
        self._ends_at = time.thread_time() + _LIMIT_S
        _current.budget = self
        return self

    def __exit__(self, *error: object) -> None:
        _current.budget = None


def _spend(amount: int) -> None:
    budget = getattr(_current, "budget", None)
    if budget is not None:  # else a template is being compiled
        budget.spend(amount)


def _left() -> int:
    budget = getattr(_current, "budget", None)
    return _LEAST if budget is None else budget.left


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget: see Budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, cache_size=0, **options)
        for name in {*self.globals} - {"range", "cycler", "joiner"}:
            del self.globals[name]
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def guard_filters(self) -> None:
        """Leave only the filters that chat templates use, and count what they make."""
        kept = {name: each for name, each in self.filters.items() if name in _FILTERS}
        self.filters.clear()
        self.filters.update({name: _guarded(name, each) for name, each in kept.items()})

    def tick(self) -> str:
        """Count a turn of a loop, or a call of a macro."""
        _spend(_TURN)
        return ""

    def made(self, value: Any) -> Any:
        """Count a list or the like that a template writes down."""
        _spend(_size(value))
        return value

    def joined(self, *parts: Any) -> str:
        """What `~` makes of its operands."""
        _spend(sum(map(_size, parts)))
        texts = [str(part) for part in parts]
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _spend(_size(left) * _count(right) + _size(right) * _count(left) + _bits(left, right))
        elif operator == "+":
            _spend(_size(left) + _size(right) + _bits(left, right))
        elif operator == "**":
            _require_small((left, right))
        elif isinstance(left, str):
            _require_narrow(left)
        made = super().call_binop(context, operator, left, right)
        _spend(_size(made))
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_call(getattr(__obj, "__name__", ""), owner, args, kwargs)
        made = super().call(__context, __obj, *args, **kwargs)
        _spend(1 + _size(made))
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _require_narrow(value.__self__)
        return wrapped

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        counted: nodes.Template = _Counting().visit(source)
        return super()._generate(counted, *args, **kwargs)


class _Dict:
    """`dict`, without the methods that change one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, whose attributes have no names that Python uses itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name like others
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}: choose another name")
        super().__setitem__(name, value)


class _Counting(NodeTransformer):
    """Makes loops and macros count their turns, and `~` what it makes."""

    def _count(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick", [], node.lineno)], lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _count

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = [self.visit(each) for each in node.nodes]
        return _call("joined", parts, node.lineno)

    def _weigh(self, node: Any) -> nodes.Call:
        return _call("made", [self.generic_visit(node)], node.lineno)

    visit_List = visit_Dict = _weigh

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weigh(node) if node.ctx == "load" else self.generic_visit(node)


def _call(name: str, args: list[Any], lineno: int) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(attribute, args, [], None, None, lineno=lineno)


def _guarded(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it makes, and takes no large numbers."""

    @functools.wraps(plain)  # what Jinja passes to it is among its attributes
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(plain, "jinja_pass_arg") else args
        subject = given[0] if given else None
        if name in ("default", "d"):
            pass  # gives back what it is given
        elif isinstance(subject, str) or name == "join":
            _check_call(name, subject, given[1:], kwargs)
        else:
            _require_small((*given[1:], *kwargs.values()))
        made = plain(*args, **kwargs)
        _spend(1 + _size(made))
        return made

    return guarded


def _check_call(name: str, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call of a string's method, or of a filter on it, that would make too much."""
    _require_small((*args, *kwargs.values()))
    strings = [each for each in (*args, *kwargs.values()) if isinstance(each, str)]
    longest = max(map(len, strings), default=0)
    if name == "format":
        _require_narrow(text)
    elif name == "replace" and strings:
        _spend(len(text) + (text.count(strings[0]) + 1) * longest)
    elif name == "join":
        items = args[0] if isinstance(text, str) and args else text
        glue = len(text) if isinstance(text, str) and args else longest
        _spend(_size(items) * (glue + 1))
    elif name == "indent":
        _spend((text.count("\n") + 1) * _LARGEST_NUMBER)


def _require_small(numbers: tuple[Any, ...]) -> None:
    for number in numbers:
        if isinstance(number, int | float) and abs(number) > _LARGEST_NUMBER:
            raise TemplateSpent(f"asks for {number}, where at most {_LARGEST_NUMBER} is of use")


def _require_narrow(form: str) -> None:
    if _WIDE.search(form):
        raise TemplateSpent(f"has the format {form[:40]!r}, which may be wide without limit")


def _size(value: Any) -> int:
    """Characters and items of a value, with all that it holds, however often; stops behind
    what is left of the budget.

    A list that holds another twice counts it twice: to show or to compare it takes that long.
    """
    size, waiting, most = 0, [value], _left() + 1
    while waiting and size < most:
        value = waiting.pop()
        size += 1
        if isinstance(value, str | bytes | range):
            size += len(value)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    return size


def _count(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _bits(left: Any, right: Any) -> int:
    """Digits that a sum or product of two whole numbers may have, about."""
    if isinstance(left, int) and isinstance(right, int):
        return (left.bit_length() + right.bit_length()) // 8
    return 0
