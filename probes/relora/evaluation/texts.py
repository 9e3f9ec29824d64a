"""Texts for perplexity, by domain: from JSONL, parquet, plain text or a dataset."""

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamics.errors import DynamicsError, FormatError, MissingError, one_line

# The split of the published evaluation set, pico-lm/pretokenized-paloma-tinsy.
DEFAULT_SPLIT = "val"
_TEXT = "text"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".txt")


def read_texts(
    sources: Sequence[str | os.PathLike[str]],
    *,
    domain_field: str | None = None,
    limit: int | None = None,
) -> dict[str, list[str]]:
    """Read texts by domain: domain -> texts, in the order of the sources, without empty texts.

    A source is one of:
        a file of JSON lines (.jsonl, .jsonl.gz, .json.gz) or parquet with a `text` field;
        a .txt file, which is one text;
        a folder: all such files below it;
        a dataset: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, opened by the library `datasets`.

    The domain of a text is the field `domain_field` of its row. Without `domain_field` it is the
    folder below the source that holds the file (as in Paloma), or the name of the file where there
    is no such folder. For a dataset it is the config, or the last part of the name.

    Args:
        sources: paths, or names of datasets; a name that exists as a path is a path.
        domain_field: the field that names the domain, e.g. "source".
        limit: read only the first so many texts of each domain.

    Raises:
        MissingError: a source is neither a path nor a dataset, or it holds no text.
        FormatError: a file is damaged, or a row has no such field.
    """
    by_domain: dict[str, list[str]] = {}
    for source in sources:
        count = sum(map(len, by_domain.values()))
        for domain, rows, where in _files(Path(source)) or _dataset(str(source)):
            _collect(by_domain, domain, rows, where, domain_field, limit)
        if sum(map(len, by_domain.values())) == count:
            raise MissingError(f"No text in {source}; give {', '.join(_SUFFIXES)} or a dataset.")
    return by_domain


_Rows = Iterable[Mapping[str, Any]]


def _collect(
    by_domain: dict[str, list[str]],
    domain: str,
    rows: _Rows,
    where: str,
    domain_field: str | None,
    limit: int | None,
) -> None:
    for row in rows:
        if domain_field is None and limit is not None and len(by_domain.get(domain, ())) >= limit:
            return
        for name in (_TEXT, domain_field):
            if name is not None and not isinstance(row.get(name), str):
                raise FormatError(
                    f"A row of {where} has no {name!r}: found {', '.join(row) or 'nothing'}; "
                    "give data that has one."
                )
        texts = by_domain.setdefault(domain if domain_field is None else row[domain_field], [])
        if row[_TEXT] and (limit is None or len(texts) < limit):
            texts.append(row[_TEXT])


def _files(source: Path) -> list[tuple[str, _Rows, str]]:
    """(domain, rows, where) of each file of a path; empty if there is no such path."""
    if source.is_file():
        if not source.name.endswith(_SUFFIXES):
            raise MissingError(f"{source} is not a file of texts; give {', '.join(_SUFFIXES)}.")
        return [(_stem(source), _rows(source), str(source))]
    paths = sorted(path for path in source.rglob("*") if path.name.endswith(_SUFFIXES))
    if source.is_dir() and not paths:
        raise MissingError(f"No text in {source}: found no file of {', '.join(_SUFFIXES)}.")
    inside = [path.relative_to(source).parts for path in paths]
    return [
        (parts[0] if len(parts) > 1 else _stem(path), _rows(path), str(path))
        for path, parts in zip(paths, inside, strict=True)
    ]


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.name.endswith(".txt"):
            yield {_TEXT: path.read_text("utf-8")}
        else:
            with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
                for line in io.TextIOWrapper(file, "utf-8"):
                    if line.strip():
                        row = json.loads(line)
                        yield row if isinstance(row, dict) else {}
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, DynamicsError):
            raise
        raise FormatError(f"Cannot read {path}: {one_line(error)}; get it again.") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _dataset(name: str) -> list[tuple[str, _Rows, str]]:
    """(domain, rows, where) of a dataset by name."""
    import datasets

    repository, *rest = name.split(":")
    *config, split = rest or [DEFAULT_SPLIT]
    names_a_path = repository.count("/") > 1 or repository.endswith(_SUFFIXES)
    if names_a_path and not Path(repository).exists():
        raise MissingError(f"No file or folder {name}; give one, or the name of a dataset.")
    try:
        rows = datasets.load_dataset(repository, *config[:1], split=split, streaming=True)
    # The client of the hub and the readers of formats raise these.
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingError(
            f"{name!r} is not a path, and cannot be opened as a dataset: {one_line(error)}; "
            "give a path, or NAME:SPLIT of a dataset on the Hugging Face hub."
        ) from error
    return [(config[0] if config else repository.rpartition("/")[2], rows, name)]
