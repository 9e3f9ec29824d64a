import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from dynamics.errors import FormatError, MissingError
from probes.relora.evaluation.texts import read_texts

ROWS = [
    {"text": "one", "source": "c4", "id": 1},
    {"text": "", "source": "c4", "id": 2},
    {"text": "two\nlines, ü", "source": "wiki", "id": 3},
    {"text": "three", "source": "c4", "id": 4},
]
TEXTS = ["one", "two\nlines, ü", "three"]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(rows).encode()))
    else:
        path.write_text(lines(rows))
    return path


@pytest.mark.parametrize("name", ["c4.jsonl", "c4.jsonl.gz", "c4.json.gz", "c4.parquet"])
def test_every_form_of_file_gives_the_same_texts_in_order(tmp_path, name):
    assert read_texts([write(tmp_path / name)]) == {"c4": TEXTS}


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "speech.txt").write_text("one\n\ntwo")
    assert read_texts([tmp_path / "speech.txt"]) == {"speech": ["one\n\ntwo"]}


def test_the_domain_is_the_folder_as_in_paloma_or_else_the_name_of_the_file(tmp_path):
    write(tmp_path / "c4_en" / "val" / "val_00000000.jsonl.gz")
    write(tmp_path / "c4_en" / "val" / "val_00000001.jsonl.gz", ROWS[:1])
    write(tmp_path / "mc4.jsonl", ROWS[3:])
    (tmp_path / "README.md").write_text("no text")
    assert read_texts([tmp_path]) == {"c4_en": [*TEXTS, "one"], "mc4": ["three"]}


def test_the_domain_is_a_field_where_one_is_named(tmp_path):
    path = write(tmp_path / "all.jsonl")
    found = read_texts([path], domain_field="source")
    assert found == {"c4": ["one", "three"], "wiki": ["two\nlines, ü"]}
    assert read_texts([path], domain_field="source", limit=1) == {
        "c4": ["one"],
        "wiki": ["two\nlines, ü"],
    }


def test_a_limit_takes_the_first_texts_of_each_domain_over_all_its_files(tmp_path):
    write(tmp_path / "a" / "1.jsonl")
    write(tmp_path / "a" / "2.jsonl")
    write(tmp_path / "b" / "1.jsonl")
    assert read_texts([tmp_path], limit=4) == {"a": [*TEXTS, "one"], "b": TEXTS}


def test_a_dataset_is_opened_by_its_name_and_split(tmp_path):
    write(tmp_path / "pages" / "train.parquet")
    assert read_texts([f"{tmp_path}/pages:train"]) == {"pages": TEXTS}
    assert read_texts([f"{tmp_path}/pages:default:train"], limit=1) == {"default": ["one"]}


def test_a_name_that_is_nothing_is_refused(tmp_path):
    for name in (f"{tmp_path}/nowhere", "nowhere.jsonl"):
        with pytest.raises(MissingError, match=f"No file or folder {name}"):
            read_texts([name])
    write(tmp_path / "pages" / "train.parquet")
    with pytest.raises(MissingError, match=r"pages:val.* cannot be opened as a dataset"):
        read_texts([f"{tmp_path}/pages:val"])


def test_sources_without_text_are_refused(tmp_path):
    with pytest.raises(MissingError, match=r"found no file of \.jsonl"):
        read_texts([tmp_path])
    with pytest.raises(MissingError, match="No text in"):
        read_texts([write(tmp_path / "empty.jsonl", ROWS[1:2])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"content": "two"}\n', "has no 'text': found content"),
        ('{"text": "one"}\n{"text": 3}\n', "has no 'text': found text"),
        ('{"text": "one"}\n["two"]\n', "has no 'text': found nothing"),
        ('{"text": "one"}\n{"text": "tw', "Cannot read .*c4.jsonl"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "c4.jsonl").write_text(content)
    with pytest.raises(FormatError, match=message):
        read_texts([tmp_path / "c4.jsonl"])


@pytest.mark.parametrize("name", ["c4.jsonl.gz", "c4.parquet"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match=f"Cannot read .*{name}"):
        read_texts([path])


def test_a_field_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FormatError, match="has no 'subdomain'"):
        read_texts([write(tmp_path / "c4.jsonl")], domain_field="subdomain")
