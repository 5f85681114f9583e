"""The hostile side of the sandbox, and the wire format of both sides; sent as text, imports nothing of ours.

The candidate runs here, in a process that holds no test and no expected value. It is asked for one thing at a time
(call this, read that) and answers with values. Only values of exact built-in types cross; all else stays here and the
judge gets a handle. Whatever the candidate does to this process, all it can change is its own answers.
"""

import builtins
import json
import os
import sys
import types

MAX_MESSAGE = 1 << 24  # bytes
PLAIN = (list, tuple, set, frozenset, dict, str, int, float, bytes)
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value, other):
    """JSON of a value. A subclass that compares like its base travels as the base; `other` encodes all else."""
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and abs(value) < 2**53):
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is list:
        return [encode(item, other) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, other) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is type and vars(builtins).get(value.__name__) is value:  # `int` itself, as an answer
        return {"type": value.__name__}
    if kind.__module__ == "collections" and kind.__name__ in ("Counter", "OrderedDict"):
        return encode(dict(value), other)
    # a named tuple, an enumeration of ints: they compare as their base does
    for base in PLAIN:
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            return encode(base(value), other)
    return other(value)


def decode(item, other):
    """The value of a JSON item, built from exact built-in types; `other` gives what a handle stands for.

    Raises:
        ValueError, TypeError, RecursionError: the item is none that `encode` makes.
    """
    if type(item) is list:
        return [decode(part, other) for part in item]
    if type(item) is not dict:
        return item
    [(kind, content)] = item.items()  # more or fewer keys than one: ValueError
    if kind == "int":
        return int(content, 16)
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(part, other) for part in content)
    if kind == "dict":
        return {decode(key, other): decode(part, other) for key, part in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "type" and type(vars(builtins).get(content)) is type:
        return vars(builtins)[content]
    if kind == "handle":
        return other(content)
    raise ValueError("an item of no known kind")


def send(channel, message):
    data = json.dumps(message).encode()
    data = len(data).to_bytes(4, "big") + data  # length, then text
    while data:
        data = data[os.write(channel, data) :]  # a pipe may take a part only


def receive(channel):
    """Raises EOFError when the other side has gone, ValueError for what is no message."""

    def take(count):
        data = bytearray()
        while len(data) < count:
            part = os.read(channel, min(count - len(data), 1 << 20))
            if not part:
                raise EOFError("the other side has gone")
            data += part
        return bytes(data)

    size = int.from_bytes(take(4), "big")
    if size > MAX_MESSAGE:
        raise ValueError("the message is too long")
    return json.loads(take(size))


def serve(read, write):
    """Run the candidate's sources in one module, then answer until the judge has gone."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # where `dataclasses` looks up a class's module
    scope, kept = module.__dict__, []

    def keep(value):
        kept.append(value)
        return {"handle": len(kept) - 1}

    def find(handle):
        if type(handle) is int:
            return kept[handle]
        if handle not in scope:
            raise NameError(f"name {handle!r} is not defined")
        return scope[handle]

    def work(action, parts):
        if action == "run":
            for source in parts:
                exec(compile(source, "candidate.py", "exec", dont_inherit=True), scope)
            return None
        target, *arguments = (decode(part, find) for part in parts)
        if action == "call":
            positional, named = arguments
            return target(*positional, **named)
        if action == "read":
            return getattr(target, arguments[0])
        if action == "write":
            return setattr(target, *arguments)
        return list(target)

    while True:
        action, *parts = receive(read)
        try:
            reply = ["value", encode(work(action, parts), keep)]
        except BaseException as error:  # SystemExit too: the guest goes on answering
            reply = ["raised", type(error).__name__, str(error)[:500]]
        send(write, reply)
