"""Error messages for a configuration: all misspelled names at once, with the nearest known."""

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
from mmcl.streams.registry import CLASS_SPLIT

_CONFIG_OPTIONS = ("--config", "-c")
_UNINFORMATIVE = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but)"
)
# Old key -> what it is called now; the entry that exists in the same group or class is meant.
RENAMED_KEYS: dict[str, tuple[str, ...]] = {
    "base_precision": ("dtype", "quantization"), "by": ("route_by",), "cache": ("cache_dir",),
    "crop": ("random_crop_scale",), "device_batch": ("micro_batch_size",),
    "drift_probes": ("drift_images",), "experts": ("num_experts",), "fit": ("image_aspect_ratio",),
    "flip": ("horizontal_flip",), "folder": ("storage_dir",), "frozen": ("freeze",),
    "global_batch": ("global_batch_size",), "group_lengths": ("group_by_length",),
    "guide": ("routing_encoder",), "image_share": ("image_weight",),
    "instance_share": ("instance_weight",), "keep": ("storage",), "heads": ("num_heads",),
    "layers": ("target_modules", "num_layers"), "length": ("prompt_length",),
    "limit": ("max_samples",), "loss_over": ("logit_scope",), "max_faults": ("max_bad_fraction",),
    "memory_bytes": ("buffer_bytes",), "mlp": ("mlp_dim",), "name": ("run_name",),
    "order": ("task_order",), "place": ("storage",), "policy": ("selection",),
    "pool": ("pool_size", "candidate_pool_size"), "pull": ("pull_weight",),
    "ratio": ("draws_per_sample",), "reference_rows": ("reference_batch_size",),
    "root": ("data_dir",), "rows": ("distill_on",), "runs": ("output_dir",),
    "samples": ("buffer_size", "fisher_samples"),
    "save_every_steps": ("checkpoint_every_n_steps",), "schedule": ("lr_schedule",),
    "scores": ("score_order",), "share": ("replay_ratio", "top_fraction"),
    "store": ("compression",), "style": ("conv_template",), "task": ("task_index",),
    "test_batch": ("eval_batch_size",), "train_scale": ("train_logit_scale",),
    "warmup": ("warmup_steps",),
    "weight": ("ewc_lambda", "overlap_weight", "reg_weight", "align_weight"),
    "width": ("projection_dim", "hidden_size"), "window": ("shuffle_window",),
    "workers": ("num_workers",),
}  # fmt: skip

_SET_BY_CONVERSION = (*CLASS_SPLIT, "class_order", "init_cls", "increment")
"""What other toolkits set for a run, PILOT's names among them."""


class ConfigError(ValueError):
    """Error in the options of a command line or in a configuration file."""

    exit_status = 2


def config_files(words: Sequence[str]) -> list[Path]:
    """Return the configuration files that a command line names with ``--config`` or ``-c``."""
    names = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    pairs = zip(words, words[1:], strict=False)
    names += [value for option, value in pairs if option in _CONFIG_OPTIONS]
    return [Path(name) for name in names]


def validate_config(file: Path, known: Collection[str]) -> list[str]:
    """Return the errors of a YAML file; ``known`` are the dotted names of all settings."""
    if not file.is_file():
        return [f"there is no configuration {file}: give the path of a YAML file to --config"]
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"{file} is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(raw, Mapping):
        return [f"{file} holds no settings: write lines such as 'data: {{stream: digits}}'"]
    return [f"{file}: {error}" for error in [*_key_errors(raw, known), *_class_errors(raw)]]


def _key_errors(raw: Mapping[str, Any], known: Collection[str], prefix: str = "") -> list[str]:
    errors: list[str] = []
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if name in known:
            continue
        is_group = any(other.startswith(f"{name}.") for other in known)
        if not is_group:
            errors.append(f"there is no setting '{name}': {_suggestion(name, known)}")
        elif isinstance(value, Mapping):
            errors += _key_errors(value, known, f"{name}.")
    return errors


def renamed_key(name: str, known: Collection[str]) -> str | None:
    """Return the new name of a renamed setting or argument among ``known``, None if it has none."""
    group, dot, key = name.rpartition(".")
    new = (f"{group}{dot}{each}" for each in RENAMED_KEYS.get(key, ()))
    return None if name in known else next((each for each in new if each in known), None)


def _suggestion(name: str, known: Collection[str]) -> str:
    """Name the setting that replaced this one, or the nearest, or those of the same group."""
    if new := renamed_key(name, known):
        return f"it is called '{new}' now"
    group, _, key = name.rpartition(".")
    if key in _SET_BY_CONVERSION:
        return (
            "classes are split into tasks when a stream is made, see mmcl data convert "
            "--classes_per_task, --first_task_classes and --class_order_seed"
        )
    siblings = [other for other in known if other.rpartition(".")[0] == group]
    nearest = get_close_matches(name, siblings, n=1, cutoff=0.7)
    nearest = nearest or get_close_matches(name, known, n=1, cutoff=0.75)
    if nearest:
        return f"did you mean '{nearest[0]}'?"
    if group:
        return f"known here: {', '.join(sorted(siblings or known))}"
    tops = sorted({other.split(".")[0] for other in known})
    nearest = get_close_matches(name, tops, n=1)
    return f"did you mean '{nearest[0]}'?" if nearest else f"known here: {', '.join(tops)}"


def _class_errors(raw: Any, key_path: str = "") -> Iterator[str]:
    """Yield the errors of every ``class_path`` and its ``init_args``."""
    if isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from _class_errors(value, f"{key_path}[{index}]")
    if not isinstance(raw, Mapping):
        return
    if isinstance(raw.get("class_path"), str):
        yield from _errors_of_class(raw["class_path"], raw.get("init_args"), key_path)
    for key, value in raw.items():
        inner = key if key not in ("init_args", "dict_kwargs") else ""
        yield from _class_errors(value, ".".join(part for part in (key_path, inner) if part))


def _errors_of_class(path: str, arguments: Any, key_path: str) -> Iterator[str]:
    cls = find_class(path)
    if isinstance(cls, str):
        yield f"{key_path} is '{path}': {cls}"
    elif cls is not None and isinstance(arguments, Mapping):
        known = inspect.signature(cls).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return
        for key in arguments:
            if key not in known:
                hint = _suggestion(str(key), known) if known else "it takes no arguments"
                yield f"{cls.__name__} has no argument '{key}': {hint}"


def find_class(path: str) -> type[Any] | str | None:
    """Find a class by its dotted path, or a strategy by its name.

    Returns:
        The class, an error message if there is none, or None if only the parser can tell.
    """
    module, _, name = path.rpartition(".")
    strategies = discover()
    if path in strategies:
        return strategies[path]
    if not module:
        return None
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        folder = Path(str(error.name))
        is_plain = folder.is_dir() and not (folder / "__init__.py").exists()
        hint = f": {folder}/ has no __init__.py, add an empty one" if is_plain else ""
        return f"there is no module '{error.name}' on the path{hint}"
    if not hasattr(loaded, name):
        if module == "mmcl.strategies":
            return unknown_strategy(name)
        names = getattr(loaded, "__all__", [n for n in dir(loaded) if not n.startswith("_")])
        return f"'{module}' has no '{name}': {_suggestion(name, names)}"
    found = getattr(loaded, name)
    return found if isinstance(found, type) else None


def unknown_strategy(name: str) -> str:
    """Return the error message for an unknown strategy."""
    known = discover()
    lowercase = {each.casefold(): each for each in known}
    nearest = get_close_matches(name.casefold(), lowercase, n=1)
    hint = f"did you mean {lowercase[nearest[0]]}? " if nearest else ""
    return f"there is no strategy {name}: {hint}Known are {', '.join(known)}"


def explain_parser_error(message: str, known: Collection[str]) -> str:
    """Return the parser's error message as one sentence; ``known`` are the names of settings."""
    if message.startswith("unrecognized arguments:"):
        options = [w.lstrip("-").split("=")[0] for w in message.split() if w.startswith("--")]
        errors = [f"there is no option --{name}: {_suggestion(name, known)}" for name in options]
        return (
            "; ".join(errors) or f"{message}: options begin with --, as in --data.max_samples 200"
        )
    if message.startswith("the following arguments are required"):
        missing = message.partition(":")[2].strip()
        return f"{missing} is not set: give a complete configuration with --config"
    key = re.search(r"(?:Parser|Option) key \"([^\"]+)\"", message)
    nested = re.search(r"NestedArg\(key='([^']+)', val='([^']*)'\)", message)
    if nested and key:
        name, inner = nested[1].partition(".")[::2]
        example = f"{{{inner}: {nested[2]}}}" if inner else nested[2]
        return (
            f"--{key[1]}.{nested[1]} is one value of a mapping, which the command line replaces "
            f"whole: give --{key[1]}.{name} '{example}', or write it into the configuration file"
        )
    strategy = re.search(r"dot import path string: (\S+)", message)
    if strategy and key and "strateg" in key[1]:
        return f"{key[1]}: {unknown_strategy(strategy[1])}"
    lacking = re.search(
        r"class_path '([^']+)':\s+the following arguments are required: (.+)", message
    )
    if lacking and key:
        name = lacking[1].rpartition(".")[2]
        return f"{key[1]} is {name} without {lacking[2]}: set {key[1]}.{lacking[2].split(',')[0]}"
    refused = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if refused:
        errors = list(_errors_of_class(refused[1], {refused[2]: None}, ""))
        return errors[0] if errors else f"{refused[1]} has no argument '{refused[2]}'"
    return _shorten(message, key[1] if key else "")


def constructor_error(error: Exception) -> str:
    """Return the error message of a constructor, without the parser's list of tried types."""
    text = str(error).strip()
    if packages := re.findall(r"Requirement '([\w.-]+)[^']*' not met", text):
        used = re.search(r"class_path '([^']+)'", text)
        name = used[1].rpartition(".")[2] if used else "a class of the configuration"
        package = packages[-1]  # Lightning names the one that it would rather have last
        return f"{name} needs the package {package}, which is missing: pip install {package}"
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return text
    reasons = re.findall(r"^\s+- (.+)$", text, re.MULTILINE)
    reasons = [reason for reason in reasons if not reason.startswith("Expected a <class")]
    return "; ".join(reasons) or text.splitlines()[0]


def _shorten(message: str, key: str) -> str:
    """Return the informative lines of a parser message as one sentence."""
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
    lines = [line for line in lines if line and not _UNINFORMATIVE.match(line)]
    text = " ".join(line for line in lines if not line.startswith(("Parser key", "Problem with")))
    return f"{name}: {text}" if name and text else text or " ".join(lines)
