"""What is wrong with a configuration: every misspelt name at once, with the nearest known."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from mmcl.strategies import discover

_ECHOES = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but)"
)


class Misconfigured(ValueError):
    """The words of a command line, or a configuration file, cannot be used."""

    exit_status = 2


def config_files(words: Sequence[str]) -> list[Path]:
    """Return the files that a command line names with ``--config`` or ``-c``."""
    found = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    pairs = zip(words, words[1:], strict=False)
    return [Path(name) for name in found + [after for word, after in pairs if word in _CONFIG]]


_CONFIG = ("--config", "-c")


def file_faults(file: Path, known: Collection[str]) -> list[str]:
    """Return everything that is misspelt in a configuration file, one sentence each.

    Args:
        file: YAML.
        known: dotted names of all settings.
    """
    if not file.is_file():
        return [f"there is no configuration {file}: give the path of a YAML file to --config"]
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"{file} is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(raw, Mapping):
        return [f"{file} holds no settings: write lines such as 'data: {{stream: digits}}'"]
    return [f"{file}: {fault}" for fault in _key_faults(raw, known) + list(_class_faults(raw))]


def _key_faults(raw: Mapping[str, Any], known: Collection[str], prefix: str = "") -> list[str]:
    faults: list[str] = []
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if name in known:
            continue
        is_group = any(other.startswith(f"{name}.") for other in known)
        if not is_group:
            faults.append(f"there is no setting '{name}': {_near(name, known)}")
        elif isinstance(value, Mapping):
            faults += _key_faults(value, known, f"{name}.")
    return faults


def _near(name: str, known: Collection[str]) -> str:
    """Return the nearest setting, or those of the same group."""
    group = name.rpartition(".")[0]
    alike = [other for other in known if other.rpartition(".")[0] == group]
    found = get_close_matches(name, alike, n=1, cutoff=0.7)
    found = found or get_close_matches(name, known, n=1, cutoff=0.75)
    if found:
        return f"did you mean '{found[0]}'?"
    if group:
        return f"known here: {', '.join(sorted(alike or known))}"
    tops = sorted({other.split(".")[0] for other in known})
    near = get_close_matches(name, tops, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(tops)}"


def _class_faults(raw: Any, place: str = "") -> Iterator[str]:
    """Look at every ``class_path`` and its ``init_args``."""
    if isinstance(raw, list):
        for number, value in enumerate(raw):
            yield from _class_faults(value, f"{place}[{number}]")
    if not isinstance(raw, Mapping):
        return
    if isinstance(raw.get("class_path"), str):
        yield from _one_class(raw["class_path"], raw.get("init_args"), place)
    for key, value in raw.items():
        inner = key if key not in ("init_args", "dict_kwargs") else ""
        yield from _class_faults(value, ".".join(part for part in (place, inner) if part))


def _one_class(path: str, arguments: Any, place: str) -> Iterator[str]:
    kind = find_class(path)
    if isinstance(kind, str):
        yield f"{place} is '{path}': {kind}"
    elif kind is not None and isinstance(arguments, Mapping):
        known = inspect.signature(kind).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return
        for key in arguments:
            if key not in known:
                hint = _near(str(key), known) if known else "it takes no arguments"
                yield f"{kind.__name__} has no argument '{key}': {hint}"


def find_class(path: str) -> type[Any] | str | None:
    """Find a class by its dotted path, or a strategy by its name.

    Returns:
        The class; a reason why there is none; or None where only the parser can tell.
    """
    module, _, name = path.rpartition(".")
    strategies = discover()
    if path in strategies:
        return strategies[path]
    if not module:
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        return f"there is no module '{error.name}' on the path"
    except AttributeError:
        if module == "mmcl.strategies":
            return unknown_strategy(name)
        home = importlib.import_module(module)
        names = getattr(home, "__all__", [n for n in dir(home) if not n.startswith("_")])
        hint = _near(name, names)
        return f"'{module}' has no '{name}': {hint}"
    return found if isinstance(found, type) else None


def unknown_strategy(name: str) -> str:
    """Return the sentence for a strategy that does not exist."""
    known = discover()
    small = {each.casefold(): each for each in known}
    near = get_close_matches(name.casefold(), small, n=1)
    hint = f"did you mean {small[near[0]]}? " if near else ""
    return f"there is no strategy {name}: {hint}Known are {', '.join(known)}"


def explain(message: str, known: Collection[str]) -> str:
    """Say in a sentence what the parser found.

    Args:
        message: of the parser's error.
        known: dotted names of all settings.
    """
    if message.startswith("unrecognized arguments:"):
        words = [w.lstrip("-").split("=")[0] for w in message.split() if w.startswith("--")]
        said = [f"there is no option --{word}: {_near(word, known)}" for word in words]
        return "; ".join(said) or f"{message}: options begin with --, as in --data.limit 200"
    if message.startswith("the following arguments are required"):
        missing = message.partition(":")[2].strip()
        return f"{missing} is not set: give a complete configuration with --config"
    key = re.search(r"(?:Parser|Option) key \"([^\"]+)\"", message)
    strategy = re.search(r"dot import path string: (\S+)", message)
    if strategy and key and "strateg" in key[1]:
        return f"{key[1]}: {unknown_strategy(strategy[1])}"
    refused = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if refused:
        faults = list(_one_class(refused[1], {refused[2]: None}, ""))
        return faults[0] if faults else f"{refused[1]} has no argument '{refused[2]}'"
    return _shortened(message, key[1] if key else "")


def refusal(error: Exception) -> str:
    """Return what a class said of its arguments, out of the parser's list of types it tried."""
    text = str(error).strip()
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return text
    tried = re.findall(r"^\s+- (.+)$", text, re.MULTILINE)
    said = [reason for reason in tried if not reason.startswith("Expected a <class")]
    return "; ".join(said) or text.splitlines()[0]


def _shortened(message: str, key: str) -> str:
    """Return the lines of a message that say something, as one sentence."""
    inner = re.findall(r"Parser key \"([^\"]+)\"", message)
    name = ".".join(dict.fromkeys([key, *inner])) or ""
    expected = re.search(
        r"Expected an? (?!path)(.+?)(?:\. Got value: (.*))?$", message, re.MULTILINE
    )
    given = re.search(r"Given value: (.+)", message)
    if expected and (expected[2] or given):
        wanted = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", expected[1])
        return f"{name} is {expected[2] or (given[1] if given else '')!r}, expected {wanted}"
    lines = [line.strip(" -") for line in message.splitlines()]
    said = [line for line in lines if line and not _ECHOES.match(line)]
    text = " ".join(line for line in said if not line.startswith(("Parser key", "Problem with")))
    return f"{name}: {text}" if name and text else text or " ".join(said)
