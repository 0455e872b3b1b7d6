"""Calls from the process that holds the tests to the process that holds the program, as lines of JSON.

Plain values (None, numbers, texts, bytes, and lists, tuples, sets and dicts of them) are copied. Anything else stays
with the program, and the tests get a `Held` in its place, which forwards attributes, calls and iteration. Comparisons
are the tests' own: a held object equals no plain value, whatever the program says.
"""

import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

_LONGEST = 1 << 24  # bytes of a message
_FORWARDED = ("len", "iter", "next", "getitem", "setitem", "delitem", "contains", "str", "repr")

_TO_PLAIN: dict[type, Callable[[Any], Any]] = {
    tuple: list,
    set: list,
    frozenset: list,
    dict: lambda value: [list(pair) for pair in value.items()],
}
_LEAVES: dict[type, Callable[[Any], Any]] = {
    bytes: bytes.hex,
    bytearray: bytearray.hex,
    complex: lambda value: [value.real, value.imag],
}
_BUILD: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
}


class Lines:
    """Messages in both directions over two descriptors."""

    def __init__(self, incoming: int, outgoing: int):
        self._incoming, self._outgoing = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")

    def send(self, message: Any) -> None:
        """Raises ValueError for one that is too long."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > _LONGEST:
            raise ValueError("a value is too large to pass between tests and program")
        self._outgoing.write(line)
        self._outgoing.flush()

    def receive(self) -> Any:
        """Raises EOFError when the other side has ended, ValueError for what is not a message."""
        line = self._incoming.readline(_LONGEST)
        if not line:
            raise EOFError("the other process has ended")
        return json.loads(line)


def _to_json(value: Any, hold: Callable[[Any], Any]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    for base in (bool, int, float, str):  # members of an IntEnum and the like
        if isinstance(value, base):
            return base(value)
    if isinstance(value, list):
        return [_to_json(part, hold) for part in value]
    for base, plain in _TO_PLAIN.items():
        if isinstance(value, base):
            return {base.__name__: [_to_json(part, hold) for part in plain(value)]}
    for base, plain in _LEAVES.items():
        if isinstance(value, base):
            return {base.__name__: plain(value)}
    return hold(value)


def _from_json(message: Any, held: Callable[[str, Any], Any]) -> Any:
    if isinstance(message, list):
        return [_from_json(part, held) for part in message]
    if not isinstance(message, dict):
        return message
    ((kind, inside),) = message.items()
    if kind not in _BUILD:
        return held(kind, inside)
    return _BUILD[kind](_from_json(inside, held))


class RemoteProgram:
    """The tests' side."""

    def __init__(self, lines: Lines):
        self._lines = lines

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """What the program has by these names, after it has run. Names of Python's own stay Python's."""
        wanted = [name for name in wanted if not name.startswith("__") and not hasattr(builtins, name)]
        found = self.ask("names", wanted)
        return {name: found[name] for name in wanted if name in found}

    def ask(self, *request: Any) -> Any:
        """Raises the built-in exception that the program raised, RuntimeError for one of its own."""
        self._lines.send([_to_json(part, _known) for part in request])
        answer = self._lines.receive()
        if "error" in answer:
            name, text = answer["error"]
            kind = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
                raise kind(text)
            raise RuntimeError(f"{name}: {text}")
        if "arguments" in answer:
            _, _, arguments, named = request
            for argument, now in zip((*arguments, *named.values()), answer["arguments"], strict=True):
                _update(argument, _from_json(now, self._held))
        return _from_json(answer["value"], self._held)

    def _held(self, kind: str, inside: Any) -> Any:
        if kind == "module" and str(inside).partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(inside)
        if kind == "held":
            return Held(self, int(inside))
        raise ValueError(f"no value of kind {kind}")


def _known(value: Any) -> Any:
    if isinstance(value, Held):
        return {"held": value._number}
    raise TypeError(f"a {type(value).__name__} of the tests cannot be passed to the program")


def _update(argument: Any, now: Any) -> None:
    """A program may change lists, dicts and sets that it is given."""
    if isinstance(argument, list) and isinstance(now, list):
        argument[:] = now
    elif (isinstance(argument, dict) and isinstance(now, dict)) or (isinstance(argument, set) and isinstance(now, set)):
        argument.clear()
        argument.update(now)


class Held:
    """An object that stays with the program."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: RemoteProgram, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self._number, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self._number, list(arguments), named)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self._program.ask("equal", self._number, other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        return self._program.ask("truth", self._number) is True


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: Held, *arguments: Any) -> Any:
        try:
            method = self.__getattr__(f"__{name}__")
        except AttributeError as error:  # what Python's own functions expect where an object has no such method
            raise TypeError(str(error)) from None
        return method(*arguments)

    return forwarded


for _name in _FORWARDED:
    setattr(Held, f"__{_name}__", _forward(_name))


def serve(lines: Lines, namespace: dict[str, Any]) -> None:
    """The program's side: answers until the tests have ended."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}  # by identity

    def hold(value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return {"held": numbers[id(value)]}

    def answer(request: list[Any]) -> dict[str, Any]:
        operation, first, *others = _from_json(request, lambda _, number: objects[number])
        if operation == "call":
            arguments, named = others
            value = _to_json(objects[first](*arguments, **named), hold)
            before = [*request[2], *(argument for _, argument in request[3]["dict"])]
            now = [_to_json(argument, hold) for argument in (*arguments, *named.values())]
            return {"value": value} if now == before else {"value": value, "arguments": now}
        if operation == "names":
            return {"value": _to_json({name: namespace[name] for name in first if name in namespace}, hold)}
        if operation == "equal":
            return {"value": bool(objects[first] == others[0])}
        if operation == "truth":
            return {"value": bool(objects[first])}
        if operation == "set":
            setattr(objects[first], *others)
            return {"value": None}
        return {"value": _to_json(getattr(objects[first], *others), hold)}

    while True:
        try:
            request = lines.receive()
        except EOFError:
            return
        try:
            lines.send(answer(request))
        except BaseException as error:  # SystemExit too: the tests decide what it means
            lines.send({"error": [type(error).__name__, str(error)]})
