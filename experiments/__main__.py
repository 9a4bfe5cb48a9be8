"""Lists what can be run: `python -m experiments`."""

import ast
import sys
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
    if sys.argv[1:] not in ([], ["--help"]):
        command = sys.argv[1] if sys.argv[1] in COMMANDS else "COMMAND"
        print(f"error: write python -m experiments.{command}, with a dot", file=sys.stderr)
        sys.exit(2)
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose(name)}" for name in COMMANDS]
    head = "python -m experiments.COMMAND, with one of these; --help tells its options:"
    print(head, "", *lines, sep="\n")
