"""Code that is the same but for its names."""

import ast

from src.grading.rows import Row

MIN_NODES = 30  # a function with a smaller syntax tree says too little: `return a + b` is no leak


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
        # 1. what is said about the function goes: docstring and annotations
        if ast.get_docstring(function) is not None:
            function.body = function.body[1:] or [ast.Pass()]
        function.returns = None
        # 2. names that it chose, numbered as they turn up: "def add(a, b): c = a + b" -> f, v1, v2, v3
        own: dict[str, str] = {function.name: "f"}
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                node.annotation = None
                own.setdefault(node.arg, f"v{len(own)}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.setdefault(node.id, f"v{len(own)}")  # names that are only read (len, math) are not its own
        for node in ast.walk(function):
            # 3. renamed in a second walk, for a name may be read higher in the tree than it is bound:
            # Name.id, arg.arg and keyword.arg, FunctionDef.name
            for field in ("id", "arg", "name"):
                if getattr(node, field, None) in own:
                    setattr(node, field, own[getattr(node, field)])
        # 4. as text, without places: `ast.dump` leaves line numbers out
        if sum(1 for _ in ast.walk(function)) >= MIN_NODES:
            trees.add(ast.dump(function))
    return trees
