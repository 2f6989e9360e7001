"""The architecture holds: layers and their imports, sizes of files, words, and forbidden calls."""

import ast
import csv
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmcl"
FILES = sorted(PACKAGE.rglob("*.py"))

# Folder -> folders of ours that it may import, besides itself where it says so.
LAYERS = {
    "core": {"core"},
    "ops": {"ops"},
    "layers": {"layers", "core", "ops"},
    "memory": {"memory", "core"},
    "models": {"models", "core"},
    "data": {"data", "core"},
    "evaluation": {"evaluation", "core"},
    "report": {"report", "core", "evaluation"},
    "strategies": {"strategies", "core", "ops", "layers", "memory"},
    "streams": {"streams", "core", "data"},
    "lightning": {
        "lightning", "core", "data", "evaluation", "report", "strategies", "streams",
    },
    "export": {"export", "core", "layers", "models", "data", "strategies", "lightning"},
    "merging": {"merging", "core", "ops", "layers", "models", "lightning", "export"},
    "diagnostics": {
        "diagnostics", "core", "ops", "layers", "models", "data", "evaluation", "report",
        "lightning",
    },
    "registry": {
        "registry", "core", "ops", "layers", "models", "data", "evaluation", "report",
        "strategies", "lightning", "export", "merging",
    },
    # Beside cli: it trains strategies on models and batches, and no layer below imports it.
    "testing": {"testing", "core", "data", "models", "strategies"},
    "cli": {
        "cli", "core", "ops", "layers", "memory", "models", "data", "evaluation", "report",
        "strategies", "streams", "lightning", "export", "merging", "diagnostics", "registry",
    },
}  # fmt: skip
# Inside of mmcl/data, from the ground up; "" are the files of the folder itself.
DATA_LAYERS = ("", "remote", "shards", "batches", "convert", "validate")
OTHERS = {
    "": set(),
    "core": {"torch", "yaml", "pydantic"},
    "ops": {"torch"},
    "layers": {"torch", "peft"},
    "memory": {"torch", "numpy", "safetensors"},
    "models": {
        "torch", "open_clip", "transformers", "timm", "torchvision", "peft", "safetensors",
        "huggingface_hub",
    },
    "data": {"torch", "numpy", "webdataset", "fsspec", "PIL", "simplejpeg", "yaml", "pyarrow"},
    "streams": {"numpy", "PIL", "sklearn", "emoji", "matplotlib", "rich", "yaml"},
    "evaluation": {"torch", "sacrebleu"},
    "report": {"torch", "matplotlib", "jinja2", "markupsafe", "rich"},
    "strategies": {"torch", "peft"},
    "lightning": {"torch", "pytorch_lightning", "jsonargparse", "yaml", "rich", "PIL"},
    "export": {"torch", "safetensors"},
    "merging": {"torch", "safetensors"},
    "diagnostics": {"torch", "numpy", "matplotlib"},
    "registry": {"torch", "safetensors", "matplotlib", "yaml"},
    "testing": {"torch"},
    "cli": {"torch", "rich"},
}  # fmt: skip
MAX_LINES, MAX_FUNCTION_LINES, MAX_FILES = 450, 50, 15
SMALL_FILE = 100
"""Lines below which a file with one reader says in its docstring why it is a file of its own."""
SAME_STEM = {"__init__", "__main__", "loading", "model", "transform"}
"""File names that may occur in several folders."""
OLD_WORDS = {
    "said", "asked", "told", "reckon", "reckoned", "picture", "pictures", "anew", "dealt", "folded",
    "likeness",
}  # fmt: skip
OLD_PHRASES = re.compile(r"\b(go(es)? on (with|from|where|exactly)|faults?)\b")
NEVER_CALLED = {"utils", "helpers", "common", "base", "misc"}


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def layer(file):
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node):
    """The modules that the import statements under a node name, with ``from x import y`` as x.y."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative import"
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


def module_level(file):
    """The imports that run when a file is imported."""
    for node in tree(file).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try):
            yield from imports(node)


def short(files):
    return [str(file.relative_to(ROOT)) for file in files]


def test_a_folder_imports_only_layers_below_it():
    wrong = []
    for file in FILES:
        if file == PACKAGE / "__init__.py":  # lazy: imports nothing until it is asked
            continue
        # `python -m mmcl` looks for this file here, and it only calls the command line.
        is_command = file == PACKAGE / "__main__.py"
        allowed = {"cli"} if is_command else LAYERS.get(layer(file), set())
        for name in imports(tree(file)):
            first, *rest = name.split(".")
            if first == "mmcl" and rest and rest[0] in LAYERS and rest[0] not in allowed:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def data_layer(parts):
    """Index in ``DATA_LAYERS`` of a module of ``mmcl.data``, given its names below ``data``."""
    return DATA_LAYERS.index(parts[0]) if parts and parts[0] in DATA_LAYERS else 0


def test_no_import_inside_data_runs_upwards():
    wrong = []
    for file in (PACKAGE / "data").rglob("*.py"):
        own = file.relative_to(PACKAGE / "data").parts[:-1]
        if file == PACKAGE / "data" / "__init__.py":
            continue
        for name in imports(tree(file)):
            if name.startswith("mmcl.data.") and data_layer(name.split(".")[2:]) > data_layer(own):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_folder_of_data_is_in_the_table():
    folders = {p.name for p in (PACKAGE / "data").iterdir() if any(p.glob("*.py"))}
    assert folders == set(DATA_LAYERS) - {""}


def test_every_folder_is_in_the_table():
    folders = {path.name for path in PACKAGE.iterdir() if any(path.rglob("*.py"))}
    assert folders == set(LAYERS)


def test_a_folder_imports_only_its_own_third_parties():
    wrong = []
    for file in FILES:
        allowed = OTHERS.get(layer(file), set())
        for name in imports(tree(file)):
            first = name.split(".")[0]
            if first not in {"mmcl", *sys.stdlib_module_names, *allowed}:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_strategy_imports_another():
    names = {file.stem for file in (PACKAGE / "strategies").glob("*.py")} - {"__init__"}
    for file in (PACKAGE / "strategies").glob("[!_]*.py"):
        others = {name.split(".")[2] for name in imports(tree(file)) if _is_strategy(name)}
        assert not others & (names - {file.stem}), file


def _is_strategy(name):
    return name.startswith("mmcl.strategies.")


def test_modules_import_each_other_in_no_circle():
    known = {name_of(file): file for file in FILES}

    def needs(module):
        for name in module_level(known[module]):
            if name in known:
                yield name
            elif name.rpartition(".")[0] in known:
                yield name.rpartition(".")[0]

    graph = {module: set(needs(module)) - {module} for module in known}
    while graph:
        leaves = {module for module, wants in graph.items() if not wants & graph.keys()}
        assert leaves, f"among these is a circle: {sorted(graph)}"
        graph = {module: wants for module, wants in graph.items() if module not in leaves}


def readers():
    """File -> the files that import it."""
    known = {name_of(file): file for file in FILES}
    found = {file: set() for file in FILES}
    for file in FILES:
        for name in imports(tree(file)):
            for module in (name, name.rpartition(".")[0]):
                if module in known and known[module] != file:
                    found[known[module]].add(file)
    return found


def test_no_file_is_too_long():
    assert short(f for f in FILES if len(f.read_text().splitlines()) > MAX_LINES) == []


def test_a_small_file_with_one_reader_says_why_it_is_a_file_of_its_own():
    lonely = [
        file
        for file, who in readers().items()
        if file.name != "__init__.py"
        and len(file.read_text().splitlines()) < SMALL_FILE
        and len({reader for reader in who if reader.name != "__init__.py"}) == 1
        and layer(file) not in ("strategies", "cli", "ops")  # ops: a formula and its test each
        and "file of its own" not in " ".join((ast.get_docstring(tree(file)) or "").lower().split())
    ]
    assert short(lonely) == []


def test_no_folder_holds_too_many_files():
    folders = {file.parent for file in FILES} - {PACKAGE / "strategies"}
    count = {f: len([p for p in f.glob("*.py") if p.name != "__init__.py"]) for f in folders}
    assert {str(f.relative_to(ROOT)): n for f, n in count.items() if n > MAX_FILES} == {}


def test_a_file_name_occurs_once():
    stems = [file.stem for file in FILES if layer(file) != "cli" and file.stem not in SAME_STEM]
    assert sorted({stem for stem in stems if stems.count(stem) > 1}) == []


def test_no_function_is_too_long():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    long = [
        f"{file.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def words_of(name):
    """Lower-case words of an identifier in snake or camel case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def identifiers(node):
    """Names that a file defines: classes, functions, arguments, variables, attributes."""
    for found in ast.walk(node):
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield found.name
        elif isinstance(found, ast.arg):
            yield found.arg
        elif isinstance(found, ast.Name | ast.Attribute) and isinstance(found.ctx, ast.Store):
            yield found.id if isinstance(found, ast.Name) else found.attr


def docstrings(node):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for found in ast.walk(node):
        if isinstance(found, kinds) and (text := ast.get_docstring(found)):
            yield text


def old_words(file):
    """Words in a file that the glossary replaced."""
    for name in identifiers(tree(file)):
        yield from (f"{name} ({word})" for word in words_of(name) & OLD_WORDS)
    for text in docstrings(tree(file)):
        found = set(re.findall(r"[a-z]+", text.lower())) & OLD_WORDS
        yield from (f"docstring: {word} in {text.splitlines()[0]!r}" for word in found)
        found = {match[0] for match in OLD_PHRASES.finditer(text.lower())}
        yield from (f"docstring: {phrase} in {text.splitlines()[0]!r}" for phrase in found)


def test_the_words_are_the_fields():
    found = {str(f.relative_to(ROOT)): sorted(set(old_words(f))) for f in FILES}
    assert {file: words for file, words in found.items() if words} == {}


def test_every_new_name_in_the_list_of_renames_is_there():
    with (ROOT / "docs" / "renames.csv").open() as file:
        rows = [(new, kind) for _, new, kind in csv.reader(file)][1:]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    modules = {name_of(file) for file in FILES} | folders | {"mmcl.models.tiny_clip"}
    assert [new for new, kind in rows if kind == "module" and new not in modules] == []
    names = {name for file in FILES for name in identifiers(tree(file))}
    defined = {"class", "function", "constant"}
    assert [new for new, kind in rows if kind in defined and new not in names] == []


def test_the_lowest_versions_are_those_that_setup_cfg_names():
    configured = (ROOT / "setup.cfg").read_text()
    bounds = dict(re.findall(r"^ {4}([\w-]+)(?:\[\w+\])?>=([\d.]+)", configured, re.M))
    lowest = (ROOT / "constraints-lowest.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", lowest, re.M))
    for name in bounds.keys() & pins.keys():
        assert f"{pins[name]}.".startswith(f"{bounds[name]}."), name
    assert bounds.keys() - pins.keys() == {
        "bitsandbytes", "codespell", "hypothesis", "mkdocs-material", "mkdocstrings", "mypy",
        "pytest", "pytest-xdist", "ruff",
    }  # fmt: skip


def test_nothing_has_a_name_that_says_nothing():
    folders = [ROOT / name for name in ("mmcl", "tests", "configs", "datasets", "examples")]
    everything = [path for folder in folders for path in folder.rglob("*")]
    assert short(path for path in everything if path.stem in NEVER_CALLED) == []


def test_the_folder_datasets_is_no_package():
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_pytorch_lightning_is_imported_in_one_folder():
    users = {
        layer(file)
        for file in FILES
        for name in imports(tree(file))
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric")
    }
    assert users == {"lightning"}


def calls(file):
    """Every call in a file, as its dotted name and the node."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def test_only_commands_print():
    printing = [
        file
        for file in FILES
        if layer(file) != "cli" and file.name != "__main__.py"
        for name, _ in calls(file)
        if name == "print"
    ]
    assert short(printing) == []


def test_nothing_decodes_a_pickle_or_runs_a_text():
    wrong = []
    for file in FILES:
        for name in imports(tree(file)):
            is_guard = file.name == "checkpoint_checks.py"  # looks through pickles, runs none
            if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve", "joblib"):
                wrong += [f"{file.relative_to(ROOT)} imports {name}"] * (not is_guard)
        for name, node in calls(file):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{file.relative_to(ROOT)} calls {name}")
            if name in ("torch.load", "open_clip.load_checkpoint", "trainer.fit"):
                wrong += [
                    f"{file.relative_to(ROOT)}: {name} without weights_only=True"
                    for _ in range(given.get("weights_only") != "True")
                ]
            if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                wrong.append(f"{file.relative_to(ROOT)} lets numpy unpickle")
    assert wrong == []


def test_imports_are_absolute():
    relative = [
        file
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert short(relative) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["core", "ops", "memory", "evaluation", "strategies"])
def test_a_low_layer_is_imported_without_the_heavy_third_parties(folder):
    heavy = "{'pytorch_lightning', 'open_clip', 'transformers', 'webdataset', 'matplotlib'}"
    code = f"import sys, mmcl.{folder}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
