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
        functions = [n for n in ast.parse(row["reference"]).body if isinstance(n, ast.FunctionDef)]
    except (SyntaxError, ValueError):
        return set()
    trees = set()
    for function in functions:
        if ast.get_docstring(function) is not None:
            function.body = function.body[1:] or [ast.Pass()]
        function.returns = None
        own: dict[str, str] = {function.name: "f"}
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                node.annotation = None
                own.setdefault(node.arg, f"v{len(own)}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.setdefault(node.id, f"v{len(own)}")
        for node in ast.walk(function):
            for field in ("id", "arg", "name"):
                if getattr(node, field, None) in own:
                    setattr(node, field, own[getattr(node, field)])
        if sum(1 for _ in ast.walk(function)) >= MIN_NODES:
            trees.add(ast.dump(function))
    return trees
