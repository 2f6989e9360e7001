"""The house keeps its plan: who imports whom, how long things are, what nobody does."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
OURS = HOUSE / "mmcl"
FILES = sorted(OURS.rglob("*.py"))

# Folder -> folders of ours that it may import, besides itself where it says so.
FLOORS = {
    "core": {"core"},
    "ops": {"ops"},
    "layers": {"layers", "core", "ops"},
    "memory": {"memory", "core"},
    "models": {"models", "core"},
    "data": {"data", "core"},
    "metrics": {"metrics", "core"},
    "report": {"report", "core", "metrics"},
    "strategies": {"strategies", "core", "ops", "layers", "memory"},
    "lightning": {"lightning", "core", "data", "metrics", "report", "strategies"},
    "commands": {
        "commands", "core", "ops", "layers", "memory", "models", "data", "metrics", "report",
        "strategies", "lightning",
    },
}  # fmt: skip
OTHERS = {
    "core": {"torch", "yaml"},
    "ops": {"torch"},
    "layers": {"torch", "peft"},
    "memory": {"torch", "numpy", "safetensors", "faiss"},
    "models": {
        "torch", "open_clip", "transformers", "timm", "torchvision", "peft", "safetensors",
        "huggingface_hub",
    },
    "data": {"torch", "numpy", "webdataset", "fsspec", "PIL", "simplejpeg"},
    "data/builders": {"numpy", "PIL", "sklearn", "emoji", "matplotlib", "rich", "yaml", "pyarrow"},
    "metrics": {"torch", "torchmetrics", "sacrebleu"},
    "report": {"torch", "matplotlib", "jinja2", "markupsafe", "rich"},
    "strategies": {"torch", "peft"},
    "lightning": {"torch", "pytorch_lightning", "jsonargparse", "yaml", "rich", "PIL"},
    "commands": {"torch", "rich", "safetensors"},
}  # fmt: skip
NEVER_CALLED = {"utils", "helpers", "common", "base", "misc"}


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def floor(file):
    parts = file.relative_to(OURS).parts
    return parts[0] if len(parts) > 1 else ""


def name_of(file):
    parts = file.relative_to(HOUSE).with_suffix("").parts
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
    return [str(file.relative_to(HOUSE)) for file in files]


def test_a_folder_imports_only_floors_below_it():
    wrong = []
    for file in FILES:
        allowed = FLOORS.get(floor(file), set())
        for name in imports(tree(file)):
            first, *rest = name.split(".")
            if first == "mmcl" and rest and rest[0] in FLOORS and rest[0] not in allowed:
                wrong.append(f"{file.relative_to(HOUSE)} imports {name}")
    assert wrong == []


def test_every_folder_stands_in_the_table():
    folders = {path.name for path in OURS.iterdir() if any(path.glob("*.py"))}
    assert folders == set(FLOORS)


def test_a_folder_imports_only_its_own_third_parties():
    wrong = []
    for file in FILES:
        allowed = OTHERS.get(floor(file), set())
        if {"builders", "making"} & set(file.parts):
            allowed = allowed | OTHERS["data/builders"]
        for name in imports(tree(file)):
            first = name.split(".")[0]
            if first not in {"mmcl", *sys.stdlib_module_names, *allowed}:
                wrong.append(f"{file.relative_to(HOUSE)} imports {name}")
    assert wrong == []


def test_no_strategy_imports_another():
    names = {file.stem for file in (OURS / "strategies").glob("*.py")} - {"__init__"}
    for file in (OURS / "strategies").glob("*.py"):
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


def test_no_file_is_over_300_lines():
    assert short(f for f in FILES if len(f.read_text().splitlines()) > 300) == []


def test_no_function_is_over_50_lines():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    long = [
        f"{file.relative_to(HOUSE)}: {node.name} has {node.end_lineno - node.lineno + 1}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > 50
    ]
    assert long == []


def test_nothing_has_a_name_that_says_nothing():
    folders = [HOUSE / name for name in ("mmcl", "tests", "configs", "datasets")]
    everything = [path for folder in folders for path in folder.rglob("*")]
    assert short(path for path in everything if path.stem in NEVER_CALLED) == []


def test_the_folder_datasets_is_no_package():
    assert not (HOUSE / "datasets" / "__init__.py").exists()


def test_pytorch_lightning_is_imported_in_one_folder():
    users = {
        floor(file)
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
    speaking = OURS / "data" / "builders" / "script.py"
    printing = [
        file
        for file in FILES
        if floor(file) != "commands" and file != speaking
        for name, _ in calls(file)
        if name == "print"
    ]
    assert short(printing) == []


def test_nothing_decodes_a_pickle_or_runs_a_text():
    wrong = []
    for file in FILES:
        for name in imports(tree(file)):
            is_guard = file.name == "shard_folder.py"  # looks through pickles, runs none
            if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve", "joblib"):
                wrong += [f"{file.relative_to(HOUSE)} imports {name}"] * (not is_guard)
        for name, node in calls(file):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{file.relative_to(HOUSE)} calls {name}")
            if name in ("torch.load", "open_clip.load_checkpoint", "trainer.fit"):
                wrong += [
                    f"{file.relative_to(HOUSE)}: {name} without weights_only=True"
                    for _ in range(given.get("weights_only") != "True")
                ]
            if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                wrong.append(f"{file.relative_to(HOUSE)} lets numpy unpickle")
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
@pytest.mark.parametrize("folder", ["core", "ops", "memory", "metrics", "strategies"])
def test_a_low_floor_is_imported_without_the_heavy_third_parties(folder):
    heavy = "{'pytorch_lightning', 'open_clip', 'transformers', 'webdataset', 'matplotlib'}"
    code = f"import sys, mmcl.{folder}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE, check=True
    )
    assert done.stdout.strip() == "[]"
