"""Loops that must not be loops: registers have no index.

    return unrolled(kernel)

    for m in each(HOLD):                  HOLD copies of the body, with the number in place of m
        states[m * CELLS + e] = …
        total = flips[m](total)           and the m-th of a list that the builder has bound

A compiler unrolls short loops on its own; a long body with an array of registers in it, it leaves alone, and puts the
array into memory. ``each(n, -1)`` counts down.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def each(count: int, step: int = 1) -> range:
    """The numbers from 0 to ``count − 1``; in a kernel, a loop over them is written out."""
    return range(count)[::step]


class _Put(ast.NodeTransformer):
    """A number in place of a name, and what a list has there in place of the list."""

    def __init__(self, name: str, number: int, names: dict[str, Any]) -> None:
        self.name, self.number, self.names = name, number, names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """The number."""
        return ast.Constant(self.number) if node.id == self.name else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """An element: a number as it is, anything else under a name of its own."""
        self.generic_visit(node)
        if not (isinstance(node.value, ast.Name) and isinstance(self.names.get(node.value.id), list)):
            return node
        assert isinstance(node.slice, ast.Constant)
        element = self.names[node.value.id][node.slice.value]
        if isinstance(element, int):
            return ast.Constant(element)
        own = f"{node.value.id}_{node.slice.value!r}"
        self.names[own] = element
        return ast.Name(own, ast.Load())


class _Unroll(ast.NodeTransformer):
    """Copies of the body in place of a loop over ``each(…)``."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def visit_For(self, node: ast.For) -> Any:
        """Inner loops first."""
        self.generic_visit(node)
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "each"):
            return node
        assert isinstance(node.target, ast.Name)
        numbers = eval(compile(ast.Expression(call), "each", "eval"), self.names)
        text, name = ast.unparse(ast.Module(node.body, [])), node.target.id
        return [_Put(name, i, self.names).visit(part) for i in numbers for part in ast.parse(text).body]


def unrolled(function: Callable[..., None]) -> Callable[..., None]:
    """The function with its loops over ``each(…)`` written out; what it closed over become its globals."""
    names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    tree = ast.fix_missing_locations(_Unroll(names).visit(tree))
    exec(compile(ast.unparse(tree), f"<unrolled {function.__qualname__}>", "exec"), names)
    made: Callable[..., None] = names[definition.name]
    return made
