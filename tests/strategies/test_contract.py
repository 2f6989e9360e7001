"""What every strategy promises, found by itself: a new file in mmcl/strategies is tested here.

Each holds the contract of ``mmcl.testing`` on a model that gives class scores and on one that
answers in words, on those of the two that it does not refuse.
"""

import inspect
import re
import sys
from typing import Literal, get_origin, get_type_hints

import pytest
from torch import nn

from mmcl.core import Chain, trainable_parameters
from mmcl.strategies import discover
from mmcl.testing import CHECKS, StrategyContract
from tests.strategies.plain_loop import learn

KNOWN = discover()
KINDS = ("classes", "answers")
SMALL = {"rank": 2}
FEW = {"ewc_lambda": 10.0, "fisher_samples": 8}
# Small arguments, or members, for one kind of model or for both; a strategy that is not named is
# made without arguments, but for a rank, which is small.
ARGUMENTS = {
    "Chain": lambda: {"strategies": [KNOWN["EWC"](ewc_lambda=10.0), KNOWN["LwF"]()]},
    "Chain answers": lambda: {
        "strategies": [KNOWN["LoRA"](rank=2), KNOWN["EWC"](**FEW), KNOWN["LwF"]()]
    },
    "EWC": lambda: {"ewc_lambda": 10.0},
    "EWC answers": lambda: FEW,
    "L2P answers": lambda: {"modality": "text", "pool_size": 4, "prompt_length": 2, "top_k": 2},
    "RanPAC": lambda: {"projection_dim": 40},
}
PAPER = re.compile(r"^Paper: (none|[^,]+ \d{4}, arXiv:\d{4}\.\d{4,5})\.", re.MULTILINE)
# Arguments that a constructor refuses, and words of the message.
BAD_ARGUMENTS = [
    ("AGEM", {"reference_batch_size": 0}, "reference_batch_size is 0: draw at least 1"),
    ("CLMoE", {"top_k": 5}, "top_k must be 1 to 4"),
    ("CLMoE", {"momentum": 1.5}, "momentum is 1.5"),
    ("CLMoE", {"instance_weight": -1.0}, "instance_weight -1.0"),
    ("DarkReplay", {"draws_per_sample": 0}, "draws_per_sample is 0, expected above 0"),
    ("EWC", {"decay": 2}, "decay 2"),
    ("EWC", {"group": 1}, "group is 1 and .*: compare captions with 2 or more"),
    ("EWC", {"fisher_samples": 0}, "fisher_samples 0"),
    ("ExperienceReplay", {"buffer_size": 0}, "buffer_bytes 0: store at least 1, or use Finetune"),
    ("ExperienceReplay", {"buffer_bytes": -5}, "buffer_bytes -5: store at least 1"),
    ("ExperienceReplay", {"selection": "ring"}, "choose one of reservoir, class_balanced, h"),
    ("ExperienceReplay", {"allocation": "most"}, "choose one of none, task_balanced"),
    ("ExperienceReplay", {"selection": "herding", "score_order": "low"},
     "'low' and selection 'herding'"),
    ("ExperienceReplay", {"selection": "loss", "candidate_pool_size": 0},
     "candidate_pool_size is 0, expected 1 or more"),
    ("ExperienceReplay", {"replay_ratio": 1.0},
     "replay_ratio is 1.0, expected more than 0 and less than 1"),
    ("ExperienceReplay", {"storage": "none"}, "choose 'reference' or 'copy'; with"),
    ("FeatureReplay", {"modality": "text"}, "modality is 'text': only 'image' features"),
    ("FeatureReplay", {"replay_ratio": 0}, "replay_ratio is 0, expected more than 0"),
    ("FeatureReplay", {"compression": "int4"},
     "compression is 'int4' and storage 'memory': choose"),
    ("FeatureReplay", {"storage": "disk", "buffer_bytes": 9},
     "bytes is 9 and storage 'disk': bound"),
    ("HiDe", {"temperature": 0.0}, "temperature is 0.0.*: give "),
    ("HiDe", {"image_weight": 2.0}, "image_weight 2.0.*: give "),
    ("HiDe", {"expanded_layers": 0}, "expanded_layers 0: give "),
    ("L2P", {"pool_size": 4, "top_k": 5}, r"1 to 4 \(the pool size\), got 5"),
    ("L2P", {"prompt_length": 0}, "prompt_length is 0"),
    ("LoRARouter", {"prototypes": 0}, "prototypes is 0.*: give "),
    ("LoRARouter", {"ridge": 0.0}, "ridge 0.0: give "),
    ("LoRARouter", {"router": "ridge", "prototypes": 2}, "several prototypes have no use"),
    ("LwF", {"temperature": 0}, "temperature 0"),
    ("LwF", {"teacher": "first"}, "teacher is 'first', expected 'previous' or 'base'"),
    *(("ModalPrompt", {word: 0}, "1 or more of the first three") for word in
      ("prompt_length", "transfer", "top_k")),
    ("ModalPrompt", {"align_weight": -1.0}, "align_weight -1.0: give 1 or more of the first three"),
    ("MoELoRA", {"num_experts": 0}, "num_experts is 0"),
    ("MoELoRA", {"samples": -1}, "samples -1"),
    ("NCM", {"scale": 0}, "scale is 0"),
    ("OLoRA", {"overlap_weight": -1.0}, "overlap_weight is -1.0"),
    ("OLoRA", {"decay": -1.0}, "decay -1.0"),
    *(("OSF", {"preserve": preserve, "growth": growth}, f"is {preserve} and growth {growth}") for
      preserve, growth in ((0.0, 0.1), (1.0, 0.1), (0.5, 1.0), (0.5, -0.1))),
    ("RanPAC", {"ridges": (0.0, 1.0)}, "at least one ridge, all above 0"),
    ("RegLoRA", {"reg_weight": -1.0}, "reg_weight is -1.0"),
    ("RegLoRA", {"top_fraction": 0.0}, "top_fraction 0.0"),
    ("RegLoRA", {"top_fraction": 1.5}, "top_fraction 1.5"),
    ("WiseFT", {"alpha": 1.5}, r"alpha is 1\.5"),
]  # fmt: skip
OF_THE_MODEL = {
    "target_modules",
    "modality",
}  # whether such an argument fits is known when attached
# What is trainable after two tasks with replay, on a model that gives class scores.
TRAINABLE = {
    "LoRA": r"patch\.lora_[AB]\.default\.weight",
    "MoELoRA": r"patch\.(A|B|router)",
    "OLoRA": r"patch\.adapters\.1\.lora_[AB]",
    "OSF": r".*\.osf_svd_params\..*",
    "RegLoRA": r"patch\.adapters\.1\.lora_[AB]",
}


def arguments_of(name, kind):
    made = ARGUMENTS.get(f"{name} {kind}", ARGUMENTS.get(name, dict))()
    taken = inspect.signature(KNOWN[name]).parameters
    return {**{word: value for word, value in SMALL.items() if word in taken}, **made}


def contract(name, kind):
    return StrategyContract(lambda: KNOWN[name](**arguments_of(name, kind)), kind)


CONTRACTS = {(name, kind): contract(name, kind) for name in sorted(KNOWN) for kind in KINDS}


def refusal(pair):
    """The error of a strategy that does not take a model of this kind, or nothing."""
    try:
        CONTRACTS[pair].trained(0)
    except TypeError as error:
        return str(error)
    return ""


REFUSALS = {pair: refusal(pair) for pair in CONTRACTS}
PAIRS = [pair for pair, message in REFUSALS.items() if not message]


@pytest.mark.parametrize("check", CHECKS.values(), ids=[c.__name__ for c in CHECKS.values()])
@pytest.mark.parametrize("pair", PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_a_strategy_holds_the_contract(pair, check):
    check(CONTRACTS[pair])


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_docstrings_state_what_is_stored_what_the_model_needs_and_the_paper(name):
    kind = KNOWN[name]
    text = inspect.getdoc(kind)
    assert "**Remembers**" in text
    assert "**Asks of the model**" in text
    if name != "Chain":
        assert len(PAPER.findall(sys.modules[kind.__module__].__doc__)) == 1


def _with_bad_values():
    """Every strategy and argument that has a bad value by its name or type, and the value."""
    for name, kind in sorted(KNOWN.items()):
        hints = get_type_hints(kind.__init__)
        for word in inspect.signature(kind).parameters:
            if word == "rank":
                yield name, word, 0
            elif word == "dropout":
                yield name, word, 1.0
            elif get_origin(hints.get(word)) is Literal and word not in OF_THE_MODEL:
                yield name, word, "nonsense"


@pytest.mark.parametrize(("name", "word", "bad"), list(_with_bad_values()))
def test_a_bad_value_is_refused_with_the_argument_and_the_value(name, word, bad):
    with pytest.raises(ValueError, match=rf"\b{word} (is )?{bad!r}.*(choose|expected|give) "):
        KNOWN[name](**{word: bad})


@pytest.mark.parametrize(("name", "given", "words"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_the_reason(name, given, words):
    with pytest.raises(ValueError, match=words):
        KNOWN[name](**given)


class Bare(nn.Module):
    """A model without any of the optional members."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_model_without_the_required_members_is_refused_by_name(name):
    asks = inspect.getdoc(KNOWN[name]).partition("**Asks of the model**")[2].split("\n\n")[0]
    members = re.findall(r"``(\w+)", asks.partition(" if ")[0])
    if not members or "nothing" in asks:
        return
    with pytest.raises(TypeError, match=rf"{name} needs model\.{members[0]}.*Bare has none"):
        KNOWN[name]().attach(Bare())


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_is_trainable_after_two_tasks_with_replay_is_known(name):
    own = CONTRACTS[name, "classes"]
    model, chain = own.new_model(), Chain([own.make(), KNOWN["ExperienceReplay"](6)])
    chain.attach(model)
    learn(model, chain, own.tasks[:2])
    assert all(re.fullmatch(TRAINABLE[name], weight) for weight in trainable_parameters(model))


def test_every_strategy_works_on_some_model():
    assert {name for name, _ in PAIRS} == set(KNOWN)


def test_a_model_is_refused_with_what_is_required_and_what_to_use():
    for (name, _), message in REFUSALS.items():
        assert re.search(r"needs .*: (use|wrap|add) ", message) if message else True, name
    refused = {
        kind: {n for (n, k), message in REFUSALS.items() if message and k == kind} for kind in KINDS
    }
    assert refused["answers"] == {"DarkReplay", "NCM", "RanPAC"}
    assert refused["classes"] == {"CLMoE", "HiDe", "LoRARouter", "ModalPrompt"}
