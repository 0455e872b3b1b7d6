"""Remote calls from the process of the tests to the process of the program, as lines of JSON.

Plain values (None, numbers, strings, bytes, and lists, tuples, sets and dicts of them) are copied. Other objects stay
in the process of the program, and the tests get a proxy, `Held`, which forwards attributes, calls and iteration. The
tests compare values in their own process: a proxy never equals a plain value, even if the program defines `__eq__`.
"""

import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

_MAX_BYTES = 1 << 24  # bytes of a message
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
    """Sends and receives JSON messages over two file descriptors."""

    def __init__(self, incoming: int, outgoing: int):
        self._incoming, self._outgoing = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")

    def send(self, message: Any) -> None:
        """Raises ValueError if the message is too long."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > _MAX_BYTES:
            raise ValueError("a value is too large to pass between tests and program")
        self._outgoing.write(line)
        self._outgoing.flush()

    def receive(self) -> Any:
        """Raises EOFError if the other process has ended, ValueError if the line is not JSON."""
        line = self._incoming.readline(_MAX_BYTES)
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
    """The program, as the tests see it."""

    def __init__(self, lines: Lines):
        self._lines = lines

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """The program's globals of these names. Built-in names are not replaced."""
        wanted = [name for name in wanted if not name.startswith("__") and not hasattr(builtins, name)]
        found = self.request("names", wanted)
        return {name: found[name] for name in wanted if name in found}

    def request(self, *request: Any) -> Any:
        """Sends a request and returns its value. Re-raises built-in exceptions, and others as RuntimeError."""
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
    raise TypeError(f"cannot pass a {type(value).__name__} of the tests to the program")


def _update(argument: Any, now: Any) -> None:
    """Applies the program's change to a list, dict or set that was an argument."""
    if isinstance(argument, list) and isinstance(now, list):
        argument[:] = now
    elif (isinstance(argument, dict) and isinstance(now, dict)) or (isinstance(argument, set) and isinstance(now, set)):
        argument.clear()
        argument.update(now)


class Held:
    """Proxy of an object in the process of the program."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: RemoteProgram, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._program.request("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.request("set", self._number, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.request("call", self._number, list(arguments), named)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self._program.request("equal", self._number, other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        return self._program.request("truth", self._number) is True


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: Held, *arguments: Any) -> Any:
        try:
            method = self.__getattr__(f"__{name}__")
        except AttributeError as error:  # what built-in functions raise for a missing method
            raise TypeError(str(error)) from None
        return method(*arguments)

    return forwarded


for _name in _FORWARDED:
    setattr(Held, f"__{_name}__", _forward(_name))


def serve(lines: Lines, namespace: dict[str, Any]) -> None:
    """Serves requests in the process of the program until the tests end."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}  # by id()

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
        except BaseException as error:  # also SystemExit, which the tests may expect
            lines.send({"error": [type(error).__name__, str(error)]})
