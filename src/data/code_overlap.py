"""Code that is the same but for its names."""

import ast

from src.grading.rows import Row

MIN_NODES = 30  # a function with a smaller syntax tree says too little: `return a + b` is no leak
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _chosen_names(function: ast.FunctionDef) -> dict[str, str]:
    """The names that a function gives, itself and those inside it among them, numbered as they turn up."""
    # "def add(a, b): c = a + b" -> {"add": "f", "a": "v1", "b": "v2", "c": "v3"}
    own = {function.name: "f"}
    for node in ast.walk(function):
        match node:
            # names that are only read (len, math) are not its own, nor is `math` in "import math"
            case (
                ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.ExceptHandler(name=name)
                | ast.alias(asname=name)
                | ast.MatchAs(name=name)
                | ast.MatchStar(name=name)
                | ast.MatchMapping(rest=name)
            ):
                if name is not None:
                    own.setdefault(name, f"v{len(own)}")
    return own


def _rename(function: ast.FunctionDef, own: dict[str, str]) -> None:
    """Write the names of `own` anew wherever the function binds or reads them."""

    def new(name: str | None) -> str | None:
        return own.get(name, name)

    defined = {node.name for node in ast.walk(function) if isinstance(node, DEFINITIONS)}
    for node in ast.walk(function):
        match node:
            case ast.Name():
                node.id = new(node.id)
            case ast.arg():
                node.arg = new(node.arg)
            case ast.alias():  # "math" stays in "import math as m"
                node.asname = new(node.asname)
            case ast.MatchMapping():
                node.rest = new(node.rest)
            case ast.Global() | ast.Nonlocal():
                node.names = [new(name) for name in node.names]
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                node.name = new(node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                node.name = new(node.name)
            # a keyword is a name of the function that is called: `key` stays in "sorted(rows, key=key)"; the walk
            # comes to a call before its parts, so that `called` is still the old name
            case ast.Call(func=ast.Name(id=called)) if called in defined:
                for keyword in node.keywords:
                    keyword.arg = new(keyword.arg)


class _Plain(ast.NodeTransformer):
    """Takes away what is said about the code: docstrings and annotations."""

    def visit(self, node: ast.AST) -> ast.AST | None:
        self.generic_visit(node)
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                node.returns = None
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign(value=None):  # "total: int"
                return ast.Pass()
            case ast.AnnAssign():  # "total: int = 0"
                return ast.Assign([node.target], node.value)
        return node


def function_trees(row: Row) -> set[str]:
    """The functions of a code row's reference as syntax trees, without docstrings, annotations and chosen names.

    Empty for other rows, for code that does not parse, and for functions of fewer than `MIN_NODES` nodes.
    """
    if row["grader"] != "python_tests":
        return set()
    try:
        # at the outer level; a method is none
        functions = [n for n in ast.parse(row["reference"]).body if isinstance(n, ast.FunctionDef)]
    except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.12
        return set()
    trees = set()
    for function in functions:
        # 1. what is said about the function and those inside it
        _Plain().visit(function)
        # 2. names that it chose
        _rename(function, _chosen_names(function))
        # 3. as text, without places: `ast.dump` leaves line numbers out
        if sum(1 for _ in ast.walk(function)) >= MIN_NODES:
            trees.add(ast.dump(function))
    return trees
