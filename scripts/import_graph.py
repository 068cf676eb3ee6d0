"""The house, drawn from its imports: python scripts/import_graph.py prints rooms, arrows, and any arrow upward.

A room is a folder of src/reeltune, or a file beside them. Exits with 1 if an import points upward.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "reeltune"
FLOORS = (  # from the top; a room imports from its own floor's other rooms or from below, never in a circle
    ("cli", "compat", "__main__"),
    ("page",),
    ("demo", "estimate"),
    ("training", "export"),
    ("sampling",),
    ("control",),
    ("cache",),
    ("run",),
    ("checkpoint",),
    ("adapters",),
    ("families", "reporting", "distributed"),
    ("config",),
    ("diffusion", "data", "optim", "memory"),
    ("core",),
)
BESIDE = frozenset({("compat", "cli"), ("__main__", "cli"), ("__main__", "compat")})  # doors that open onto another


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    """Dotted, without reeltune."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it. Raises AssertionError for a relative import."""
    names = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file}: relative import"
            inside = PACKAGE / Path(*node.module.split(".")[1:])
            for alias in node.names:
                is_module = (inside / f"{alias.name}.py").is_file() or (inside / alias.name).is_dir()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def own_imports(file: Path) -> set[str]:
    """Those of reeltune itself, without that first part."""
    return {name.removeprefix("reeltune.") for name in imports_of(file) if name.startswith("reeltune.")}


def floor_of(room: str) -> int:
    """From the top. Raises LookupError for a room that is on no floor."""
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise LookupError(f"{room} is on no floor; give it a place in FLOORS of {Path(__file__).name}")


def arrows() -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> by how many imports."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        room = module_of(file).partition(".")[0]
        if room:
            found.update((room, other) for name in own_imports(file) if (other := name.partition(".")[0]) != room)
    return found


def upward(arrow: tuple[str, str]) -> bool:
    """Whether it points to a floor above, or to a room beside that is not its door."""
    room, other = arrow
    return floor_of(other) < floor_of(room) or (floor_of(other) == floor_of(room) and arrow not in BESIDE)


def main() -> int:
    found = arrows()
    for level, rooms in enumerate(FLOORS):
        for room in rooms:
            below = sorted(other for one, other in found if one == room)
            print(f"{level} {room:12} -> {' '.join(below) or 'nothing'}")
    wrong = sorted(arrow for arrow in found if upward(arrow))
    print(f"{sum(map(len, FLOORS))} rooms, {len(found)} arrows, {len(wrong)} upward")
    for room, other in wrong:
        print(f"upward: {room} -> {other}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
