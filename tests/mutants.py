"""Tries a random sample of mutants; run by `make mutants`.

python -m tests.mutants [--sample 60] [--seed 0] [PATTERN ...]

A mutant is a copy of a function with one small change: another operator, number or argument. A
mutant survives if all tests pass with it. Then a test is missing, or the change makes no
difference. `[tool.mutmut]` in pyproject.toml says which files are changed, and which tests run.
The folder `mutants` keeps what was tried; `mutmut browse` looks at it.
"""

import argparse
import fnmatch
import json
import random
from contextlib import redirect_stdout
from pathlib import Path

from mutmut import __main__ as mutmut


def generate() -> list[str]:
    """Write all mutants into the folder `mutants`; their names."""
    mutmut.set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    with redirect_stdout(None):  # the name of every file
        mutmut.create_mutants(1)
    files = Path("mutants").rglob("*.py.meta")
    return sorted(
        name for file in files for name in json.loads(file.read_text())["exit_code_by_key"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a random sample of mutants.")
    parser.add_argument(
        "patterns", nargs="*", default=["*"], help="names, e.g. dynamics.spectra.gram.*"
    )
    parser.add_argument("--sample", type=int, default=60, help="how many; 0 tries all")
    parser.add_argument("--seed", type=int, default=0, help="another seed tries others")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    names = [
        name
        for name in generate()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)
    ]
    if 0 < options.sample < len(names):
        names = sorted(random.Random(options.seed).sample(names, options.sample))
    print(f"{len(names)} mutants")
    mutmut._run(names, options.processes)
    for each, name, exit_code in mutmut.collect_source_file_mutation_data(mutant_names=names)[0]:
        if mutmut.status_by_exit_code[exit_code] == "survived":
            print(f"\n{name} survived:\n{mutmut.get_diff_for_mutant(name, path=each.path)}")


if __name__ == "__main__":
    main()
