"""The optimizer step that a checkpoint belongs to: from its name, or from a number in its file."""

import re
from dataclasses import dataclass
from functools import lru_cache

BARE = "-"  # the word of a number that stands alone
# A larger number does not count steps (it is a date with a time, or a hash), and is no int64.
_LIMIT = 10**15
_UNITS = {"": 1, "k": 1000, "m": 1_000_000} | {f"e{n}": 10**n for n in range(10)}
_NUMBER = re.compile(
    r"(?P<word>[a-z]*)(?P<gap>[-_=.: ]*)(?P<number>\d+(?:\.\d+)*)(?P<unit>(?:[km]|e\d)?)"
    r"(?:[-_ ]?(?P<after>(?:step|iter|iteration|update|epoch)s?)(?![a-z]|[-_=.: ]*\d))?"
    r"(?P<rest>[a-z]*)",
    re.IGNORECASE,
)
# Numbers that count nothing: dates, with a time or without; hashes; "00001-of-00002" of shards;
# "Q4_K_M" of GGUF.
_NO_COUNT = re.compile(
    r"(?<![a-z\d])(?:"
    r"(?:19|20)\d\d[-_.](?:0\d|1[0-2])[-_.][0-3]\d(?:[-_ t]*\d\d[-_:.]?\d\d(?:[-_:.]?\d\d)?)?"
    r"|(?:19|20)\d\d(?:0\d|1[0-2])[0-3]\d(?:[-_t]?\d{6})?"
    r"|[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}"
    r"|(?=\d*[a-f])(?=[a-f]*\d)[\da-f]{7,}"
    r"|\d{4,}-of-\d{4,}"
    r"|[it]?q\d_[a-z\d]+(?:_[sml])?"
    r")(?![a-z\d])",
    re.IGNORECASE,
)
_STEP = re.compile(r".*(?:step|iter|iteration|update)s?|ba")  # ba: batches, of Composer
_CHECKPOINT = re.compile(r".*(?:checkpoint|ckpt|chkpt)s?|models?|weights|params|net|save|")
_EPOCH = re.compile(r".*epochs?|ep")
# Words whose number is never a step: versions, places, measurements, and names of models.
_OTHER_COUNTS = re.compile(
    r"v|ver|version|rev|rank|seed|stage|phase|ingredient|layers?|block|part|shard|of|tok(?:en)?s?"
    r"|loss|acc|accuracy|lr|ppl|val|eval|test|gpu|node|worker|fold|run|exp|trial|head|expert|fsdp"
    r"|log|samples?|image|gpt|phi|llama|qwen|gemma|mistral|bert|falcon|opt|olmo|pythia|vit|resnet"
    r"|t|yi"
)
# What a name may say without being that of something else than the model at a step.
_NEUTRAL = re.compile(
    r"global|train|training|state|dict|net|models?|weights|params|save|hf|final|last|best|latest"
    r"|current|end|loss|acc|accuracy|val|tok(?:en)?s?|stage|of|[kmbtve]"
)
_LATEST = re.compile(r"(?:^|[^a-z])(?:final|last|best|latest|current|end)(?:$|[^a-z])", re.I)


@dataclass(frozen=True)
class NamedStep:
    """What a name says of a step.

    Attributes:
        step: the count of optimizer steps; of epochs, where the name counts nothing else.
        level: how surely the number is a step: 0 after "step", "checkpoint" and the like or alone,
            1 an epoch, 2 after an unknown word ("x_100"), 3 right behind one ("x100").
        word: the word before the number; `BARE` for none.
        others: the words of the name that are not usual in names of checkpoints: ("ema",).
        repeats: whether the name says "last", "best" and the like too; such a file often repeats
            another one.
    """

    step: int
    level: int
    word: str
    others: tuple[str, ...]
    repeats: bool


@lru_cache(maxsize=2**15)  # every format looks at the same names
def named_step(name: str) -> NamedStep | None:
    """The step that a name tells; None where it tells none.

    The number after step, iter or update counts; else that after checkpoint, ckpt or model, or one
    that stands alone; else an epoch; else the number after any other word. Of several, the last.
    Dates, hashes, versions, sizes (7b), ranks and the like are no steps, nor is a number that is
    too large for one.

    >>> named_step("epoch=3-step=1500").step, named_step("step10k").step, named_step("1.5M").step
    (1500, 10000, 1500000)
    >>> named_step("epoch_2").level, named_step("llama-7b"), named_step("v2")
    (1, None, None)
    """
    name = _NO_COUNT.sub(" ", name.lower())
    found = [(rank, step, word) for rank, step, word in map(_read, _NUMBER.finditer(name)) if word]
    if not found:
        return None
    best = min(rank for rank, *_ in found)
    _, step, word = [each for each in found if each[0] == best][-1]
    words = re.findall(r"[a-z]+", name)
    counting = (_STEP, _CHECKPOINT, _EPOCH)
    others = [
        each
        for each in words
        if not _NEUTRAL.fullmatch(each)
        and (each == word or not any(p.fullmatch(each) for p in counting))
    ]
    usual = best < 3
    others = [each for each in others if not (usual and each == word)]
    level = max(best - 1, 0)
    if word == BARE and others and level == 0:
        level = 2  # "2_Dense" is a part of a model, and no step 2
    return NamedStep(step, level, word, tuple(others), bool(_LATEST.search(name)))


def _read(match: re.Match[str]) -> tuple[int, int, str | None]:
    """(rank of the word, step, word) of a number; no word where it is no step."""
    word, number, after = match["word"], match["number"], match["after"] or ""
    if not word and after:
        word = after
    rank = 4 if not match["gap"] and word else 3
    for better, pattern in enumerate((_STEP, _CHECKPOINT, _EPOCH)):
        if pattern.fullmatch(word):
            rank = better
            break
    size = float(number) if number.count(".") == 1 else None
    whole = "." not in number or (size is not None and bool(match["unit"]))
    step = 0
    if whole:
        scale = _UNITS[match["unit"]]
        step = round(size * scale) if size is not None else int(number[:20]) * scale
    sound = whole and not match["rest"] and not _OTHER_COUNTS.fullmatch(word) and len(number) <= 20
    if rank >= 3 and match["unit"]:
        sound = False  # "pythia-125m" is a size
    return rank, step, (word or BARE) if sound and step < _LIMIT else None


def step_in_name(stem: str) -> int | None:
    """The step in a name, as `named_step` reads it; None where there is none.

    >>> step_in_name("step=300-loss=2.51"), step_in_name("model-000200"), step_in_name("best")
    (300, 200, None)
    """
    named = named_step(stem)
    return None if named is None else named.step


def step_inside(value: object) -> int | None:
    """A value that stands in a file, as a step; None where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
        return None
    return value
