"""The house rules, read off the source: who imports whom, sizes, docstrings with examples, no branch on a format."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from decompositions import Network

ROOT = Path(__file__).parent.parent
PACKAGES = ("decompositions", "cross_approx", "tnlayers")  # each may import those before it
OUTER = ("examples", "tests", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OUTER_FILES = sorted(path for folder in OUTER for path in (ROOT / folder).rglob("*.py"))

EVERYWHERE = {"torch", "opt_einsum", "numpy", "jaxtyping"}
# Rooms nobody may import, and rooms that do not import one another (DESIGN section 3).
NOBODY_IMPORTS = ("tnlayers.cli", "tnlayers.kg", "tnlayers.grids")
APART = ("tnlayers.integrators", "tnlayers.adapters", "tnlayers.spectral")

LONG_FILES = {  # path: why it may have more than 500 lines
    "tests/test_formats.py": "the suite that every format inherits, in one place",
    "tests/test_layers.py": "the suite that every layer inherits, in one place",
    "tests/test_report.py": "one file a room",
    "tests/test_convert.py": "one file a room",
    "benchmarks/compress.py": "five parts of one table",
}

FORMATS = {name for name in Network.formats if Network.formats[name].__module__.startswith("decompositions.")}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Every imported module below a node, as `a.b`; `from a import b` counts as `a.b` where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            source = node.module or ""
            found.add(source)
            for alias in node.names:
                path = ROOT.joinpath(*source.split("."), alias.name)
                if path.is_dir() or path.with_suffix(".py").exists():
                    found.add(f"{source}.{alias.name}")
    return found


def imports_at_module_level(tree: ast.Module) -> set[str]:
    """What runs on import: everything outside functions and outside `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ClassDef):
            node = ast.Module([n for n in node.body if not isinstance(n, ast.FunctionDef)], [])
        found |= imports(node)
    return found


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- imports ---


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    ours = {name for name in imports(parse(path)) if name.split(".")[0] in (*PACKAGES, *OUTER)}
    assert {name for name in ours if name.split(".")[0] not in allowed} == set()


@pytest.mark.parametrize("path", FILES, ids=names)
def test_importing_needs_only_what_is_always_there(path):
    roots = {name.split(".")[0] for name in imports_at_module_level(parse(path))}
    extra = roots - set(sys.stdlib_module_names) - EVERYWHERE - set(PACKAGES)
    if path.parent == ROOT / "tnlayers" and path.name in ("cli.py", "cli_grid.py", "cli_kg.py"):
        extra -= {"typer"}  # the command line is typer's; nothing imports it
    assert extra == set()


@pytest.mark.parametrize("path", sorted((ROOT / "decompositions" / "formats").glob("*.py")), ids=names)
def test_formats_import_only_linalg_and_themselves(path):
    ours = {name for name in imports(parse(path)) if name.split(".")[0] in PACKAGES}
    # `from decompositions import linalg` counts as the package too
    allowed = {"decompositions.linalg", "decompositions.lockstep", "decompositions"}
    assert {name for name in ours if not name.startswith("decompositions.formats")} <= allowed
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module == "decompositions" for node in ast.walk(parse(path))
    )


@pytest.mark.parametrize("path", FILES, ids=names)
def test_rooms_that_stay_apart(path):
    module, imported = module_of(path), imports(parse(path))
    for room in NOBODY_IMPORTS:
        if not module.startswith((room, "tnlayers.cli")):
            assert not [name for name in imported if (name + ".").startswith(room + ".")]
    for room in APART:
        if module.startswith(room):
            assert not [name for name in imported for other in APART if other != room and name.startswith(other)]


def test_import_of_decompositions_is_light():
    """What a fresh interpreter holds after the import: none of the heavy packages."""
    code = "import sys, decompositions; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"scipy", "tensorly", "rich", "matplotlib", "typer", "safetensors", "cross_approx", "tnlayers"}


# --- formats are data: nothing in a generic room asks which one it has ---


def branches_on_formats(tree: ast.Module) -> list[str]:
    """`isinstance`, `issubclass`, `type(x) is` and `match` on format classes."""
    found = []
    for node in ast.walk(tree):
        suspects: list[ast.AST] = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            suspects = node.args[1:]
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            suspects = [node]
        elif isinstance(node, ast.MatchClass):
            suspects = [node.cls]
        for suspect in suspects:
            used = {leaf.id for leaf in ast.walk(suspect) if isinstance(leaf, ast.Name)}
            used |= {leaf.attr for leaf in ast.walk(suspect) if isinstance(leaf, ast.Attribute)}
            if used & FORMATS - {"Network"}:
                found.append(f"line {node.lineno}: {ast.unparse(suspect)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_branch_on_the_identity_of_a_format(path):
    assert branches_on_formats(parse(path)) == []


def test_the_branch_test_sees_branches():
    code = "isinstance(net, (TT, fmt.Tucker))\ntype(net) is LowRank\nmatch net:\n    case TTMatrix(): pass"
    assert len(branches_on_formats(ast.parse(code))) == 3
    assert {"LowRank", "Tucker", "TT", "TTMatrix", "Network"} <= FORMATS


def test_formats_are_final_and_none_inherits_from_another():
    for name in FORMATS - {"Network"}:
        kind = Network.formats[name]
        assert kind.__bases__ == (Network,)
        assert getattr(kind, "__final__", False), name


# --- sizes, words ---


@pytest.mark.parametrize("path", FILES + OUTER_FILES, ids=names)
def test_long_files_have_a_reason(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500 or LONG_FILES.get(names(path))


def public(package: str) -> list[tuple[str, object]]:
    module = importlib.import_module(package)
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


PUBLIC = [(package, name, value) for package in PACKAGES for name, value in public(package)]


@pytest.mark.parametrize(("package", "name", "value"), PUBLIC, ids=[f"{p}.{n}" for p, n, _ in PUBLIC])
def test_public_names_have_a_docstring_with_an_example(package, name, value):
    documentation = inspect.getdoc(value) or ""
    assert documentation, f"{package}.{name} needs a docstring"
    if inspect.isclass(value) and issubclass(value, Warning | tuple):
        return  # a warning category or a plain record has nothing to show
    assert ">>>" in documentation, f"{package}.{name} needs an Example"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_few(package):
    assert len(public(package)) <= 60  # nine formats and what decomposes into them are half of `decompositions`


@pytest.mark.parametrize("path", [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")], ids=names)
def test_doctests(path):
    module = importlib.import_module(module_of(path))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for test in finder.find(module, module.__name__) if test.examples]
    seen = {test.name for test in tests}
    tests += [  # singledispatch objects and decorated functions: doctest does not look inside
        test
        for name, value in vars(module).items()
        if hasattr(value, "__wrapped__") and value.__module__ == module.__name__
        if f"{module.__name__}.{name}" not in seen
        for test in [doctest.DocTestParser().get_doctest(value.__doc__ or "", dict(vars(module)), name, names(path), 0)]
        if test.examples
    ]
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)
    assert tests


# --- paths ---


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_no_absolute_machine_paths():
    pattern = re.compile(r"""(?<![\w.:/~])/(?:work|home|Users|root|mnt)/\w""")
    found = []
    for path in tracked():
        if not path.is_file() or path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures
        found += [f"{names(path)}: {line.strip()}" for line in text.splitlines() if pattern.search(line)]
    assert found == []
