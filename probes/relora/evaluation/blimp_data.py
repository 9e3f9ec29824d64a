"""The minimal pairs of BLiMP: read from its official files, downloaded on request."""

import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamics.errors import DynamicsError, FormatError, MissingError, one_line

HOME = "https://raw.githubusercontent.com/alexwarstadt/blimp/master/data"
PARADIGMS = (
    "adjunct_island",
    "anaphor_gender_agreement",
    "anaphor_number_agreement",
    "animate_subject_passive",
    "animate_subject_trans",
    "causative",
    "complex_NP_island",
    "coordinate_structure_constraint_complex_left_branch",
    "coordinate_structure_constraint_object_extraction",
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_2",
    "determiner_noun_agreement_irregular_1",
    "determiner_noun_agreement_irregular_2",
    "determiner_noun_agreement_with_adj_2",
    "determiner_noun_agreement_with_adj_irregular_1",
    "determiner_noun_agreement_with_adj_irregular_2",
    "determiner_noun_agreement_with_adjective_1",
    "distractor_agreement_relational_noun",
    "distractor_agreement_relative_clause",
    "drop_argument",
    "ellipsis_n_bar_1",
    "ellipsis_n_bar_2",
    "existential_there_object_raising",
    "existential_there_quantifiers_1",
    "existential_there_quantifiers_2",
    "existential_there_subject_raising",
    "expletive_it_object_raising",
    "inchoative",
    "intransitive",
    "irregular_past_participle_adjectives",
    "irregular_past_participle_verbs",
    "irregular_plural_subject_verb_agreement_1",
    "irregular_plural_subject_verb_agreement_2",
    "left_branch_island_echo_question",
    "left_branch_island_simple_question",
    "matrix_question_npi_licensor_present",
    "npi_present_1",
    "npi_present_2",
    "only_npi_licensor_present",
    "only_npi_scope",
    "passive_1",
    "passive_2",
    "principle_A_c_command",
    "principle_A_case_1",
    "principle_A_case_2",
    "principle_A_domain_1",
    "principle_A_domain_2",
    "principle_A_domain_3",
    "principle_A_reconstruction",
    "regular_plural_subject_verb_agreement_1",
    "regular_plural_subject_verb_agreement_2",
    "sentential_negation_npi_licensor_present",
    "sentential_negation_npi_scope",
    "sentential_subject_island",
    "superlative_quantifiers_1",
    "superlative_quantifiers_2",
    "tough_vs_raising_1",
    "tough_vs_raising_2",
    "transitive",
    "wh_island",
    "wh_questions_object_gap",
    "wh_questions_subject_gap",
    "wh_questions_subject_gap_long_distance",
    "wh_vs_that_no_gap",
    "wh_vs_that_no_gap_long_distance",
    "wh_vs_that_with_gap",
    "wh_vs_that_with_gap_long_distance",
)
_FIELDS = ("sentence_good", "sentence_bad", "UID", "linguistics_term", "field")
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Paradigm:
    """One paradigm: pairs of sentences that differ in the same way.

    Attributes:
        name: its UID, e.g. "adjunct_island".
        phenomenon: the linguistics_term of the file, e.g. "island_effects".
        field: "morphology", "semantics", "syntax" or "syntax_semantics".
        pairs: (acceptable, unacceptable) sentences, in the order of the file.
    """

    name: str
    phenomenon: str
    field: str
    pairs: tuple[tuple[str, str], ...]


def read_blimp(
    folder: str | os.PathLike[str], *, limit: int | None = None, only: Sequence[str] | None = None
) -> list[Paradigm]:
    """Read the paradigms of a folder, by name: every *.jsonl in it, with the fields of BLiMP.

    Args:
        folder: the data folder of the BLiMP repository, or one with some of its files.
        limit: read only the first so many pairs of each paradigm; all by default.
        only: the paradigms to read; all that the folder has by default.

    Raises:
        MissingError: there is no such folder or file.
        FormatError: a line is not a pair, or a file holds two paradigms.
    """
    root = Path(folder)
    files = {path.stem: path for path in sorted(root.glob("*.jsonl"))}
    if not files:
        raise MissingError(
            f"No *.jsonl in {root}; give the data folder of github.com/alexwarstadt/blimp, or "
            "download it there with --download-blimp."
        )
    for name in only or ():
        if name not in files:
            raise MissingError(f"No {name}.jsonl in {root}; available: {', '.join(files)}.")
    return [_paradigm(files[name], limit) for name in only or files]


def missing_paradigms(paradigms: Sequence[Paradigm]) -> list[str]:
    """The official paradigms that are not among these."""
    present = {each.name for each in paradigms}
    return [name for name in PARADIGMS if name not in present]


def download_blimp(
    folder: str | os.PathLike[str],
    *,
    home: str = HOME,
    only: Sequence[str] = PARADIGMS,
    say: Callable[[str], None] = print,
) -> None:
    """Fetch the files of BLiMP (CC BY 4.0, 22 MB) into a folder; existing files stay.

    A file appears in the folder only after it was fetched and read without error.

    Args:
        folder: gets one .jsonl file per paradigm; it is made if it does not exist.
        home: the address of the folder that holds them.
        only: paradigms to fetch.
        say: gets one line that says what is fetched.

    Raises:
        DynamicsError: a file cannot be fetched, or is not a BLiMP file.
    """
    root = Path(folder)
    wanted = [name for name in only if not (root / f"{name}.jsonl").is_file()]
    if wanted:
        say(f"Fetching {len(wanted)} BLiMP files from {home} into {root}")
        root.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        address = f"{home}/{name}.jsonl"
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
                content = answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DynamicsError(
                f"Cannot fetch {address}: {one_line(error)}; try again, or give a folder that "
                "holds the files."
            ) from error
        unfinished = root / f"{name}.jsonl.part"
        unfinished.write_bytes(content)
        _paradigm(unfinished, None)
        os.replace(unfinished, root / f"{name}.jsonl")


def _paradigm(path: Path, limit: int | None) -> Paradigm:
    rows: list[tuple[str, ...]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines()[:limit], start=1):
        try:
            row = json.loads(line)
            rows.append(tuple(str(row[name]) for name in _FIELDS))
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(
                f"Line {number} of {path} is not a BLiMP pair with {', '.join(_FIELDS)} "
                f"({one_line(error)}); fetch the file again."
            ) from error
    if len({row[2] for row in rows}) != 1:
        raise FormatError(f"{path} does not hold one paradigm (UID); fetch the file again.")
    _, _, name, phenomenon, field = rows[0]
    # One paradigm spells it with a slash.
    pairs = tuple((good, bad) for good, bad, *_ in rows)
    return Paradigm(name, phenomenon, field.replace("/", "_"), pairs)
