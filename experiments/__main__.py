"""Lists what can be run: `python -m experiments`."""

import ast
from pathlib import Path

COMMANDS = (
    *("mnist", "language_model", "launch"),
    *("imbalance", "noisy_labels", "calibration", "multitask", "distillation"),
    *("benchmark", "numerics", "compile_only"),
)


def purpose(name: str) -> str:
    """The first line of a command's docstring, without importing what it needs."""
    source = (Path(__file__).parent / f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


if __name__ == "__main__":
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose(name)}" for name in COMMANDS]
    head = "python -m experiments.COMMAND, with one of these; --help tells its options:"
    print(head, "", *lines, sep="\n")
