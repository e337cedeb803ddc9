"""Which line of source a machine instruction stems from, and which lines were written for which loop of a kernel.

Compilers move code and merge loops, but keep with every instruction the line it was written on. Where functions were
inlined that may be a chain of lines, from the innermost function's out to the kernel's, or just the innermost. Of a
chain the line in the function that is asked about is what tells; without one, what was written for a loop or a function
are its own lines and all of the functions that it calls.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Place = tuple[str, int]  # name of a file, line

_PLACE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)( inlined at )?')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s")


def places_of_code(listing: str, *functions: Callable[..., Any]) -> dict[int, Place]:
    """For every address in a listing of `nvdisasm -gi` that has one, the place it stems from.

    Of a chain of lines that is the one in one of the functions, else the innermost.
    """
    inside = {place for function in functions for place in _places(function, _lines(_definition(function)))}
    chain, ended, places = [], True, {}
    for text in listing.splitlines():
        if found := _PLACE.match(text):
            chain = [*([] if ended else chain), (Path(found[1]).name, int(found[2]))]
            ended = found[3] is None
        elif chain and (instruction := _INSTRUCTION.match(text)):
            places[int(instruction[1], 16)] = next((place for place in chain if place in inside), chain[0])
    return places


def places_of_loop(kernel: Callable[..., Any], variable: str) -> frozenset[Place]:
    """The lines that `for variable in ...` takes, less those of loops in it, and all of the device functions it calls.

    Raises ValueError if the kernel has no such loop.
    """
    for loop in ast.walk(_tree(kernel)):
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and loop.target.id == variable:
            inner = [other for other in ast.walk(loop) if isinstance(other, ast.For) and other is not loop]
            own = set(_lines(loop)) - {line for other in inner for line in _lines(other)}
            calls = (node for node in ast.walk(loop) if getattr(node, "lineno", None) in own)
            return _places(kernel, own) | _called(kernel, calls)
    raise ValueError(f"the kernel has no loop over {variable}")


def places_of_function(function: Callable[..., Any]) -> frozenset[Place]:
    """All lines of a device function, and of those that it calls."""
    definition = _definition(function)
    return _places(function, _lines(definition)) | _called(function, ast.walk(definition))


def _called(function: Callable[..., Any], nodes: Iterable[ast.AST]) -> frozenset[Place]:
    """All lines of the device functions that calls among the nodes go to, and of those that they call."""
    found: frozenset[Place] = frozenset()
    names = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for name in names:
        if callable(called := getattr(function.__globals__.get(name), "fn", None)):
            found |= places_of_function(called)
    return found


def _tree(function: Callable[..., Any]) -> ast.Module:
    """The source of a function, with the file's line numbers."""
    source, first = inspect.getsourcelines(function)
    return ast.increment_lineno(ast.parse(textwrap.dedent("".join(source))), first - 1)


def _definition(function: Callable[..., Any]) -> ast.stmt:
    (definition,) = _tree(function).body
    return definition


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _places(function: Callable[..., Any], lines: Iterable[int]) -> frozenset[Place]:
    name = Path(inspect.getfile(function)).name
    return frozenset((name, line) for line in lines)
