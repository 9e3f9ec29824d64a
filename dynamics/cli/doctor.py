"""`dynamics doctor`: what is installed here, what computes, and where caches lie."""

import os
import platform
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

from dynamics.errors import one_line

_CORE = ("learning-dynamics", "torch", "numpy", "scipy", "xarray", "zarr", "pandas")
# Extras for those who work on the project, not with it.
_OF_DEVELOPERS = ("browser", "dev", "bench", "docs", "mutants", "notebooks")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def extras() -> dict[str, list[str]]:
    """Extra -> the packages that it brings, by the names that imports use."""
    found: dict[str, list[str]] = {}
    try:
        required = metadata.requires("learning-dynamics") or []
    except metadata.PackageNotFoundError:  # the source tree on PYTHONPATH
        return {}
    for each in required:
        match = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", each)
        if match and match[2] not in _OF_DEVELOPERS:
            found.setdefault(match[2], []).append(match[1].replace("-", "_"))
    return found


def diagnosis() -> dict[str, list[tuple[str, str]]]:
    """Heading -> (what, how it is here)."""
    return {
        "versions": [("Python", platform.python_version()), *((n, _version(n)) for n in _CORE)],
        "extras": [(extra, _presence(extra, packages)) for extra, packages in extras().items()],
        "devices": _devices(),
        "linear algebra": _libraries(),
        "caches": _caches(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _presence(extra: str, packages: list[str]) -> str:
    versions = {name: _version(name) for name in packages}
    if "not installed" not in versions.values():
        return ", ".join(f"{name} {version}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version == "not installed"]
    return f"without {', '.join(missing)}: pip install 'learning-dynamics[{extra}]'"


def _devices() -> list[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("cpu", f"{platform.machine()}, {usable} of {os.cpu_count()} cores usable")]
    try:
        import torch

        number = torch.cuda.device_count()
        found += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(number)]
        return found if number else [*found, ("cuda", "none; --device cuda is refused")]
    except Exception as error:  # a driver that does not fit: what a doctor is asked about
        return [*found, ("cuda", f"cannot be asked: {one_line(error)}")]


def _libraries() -> list[tuple[str, str]]:
    import numpy.linalg
    import scipy.linalg
    from threadpoolctl import threadpool_info

    assert numpy.linalg
    assert scipy.linalg
    found = [(_library(each), f"{each['num_threads']} threads") for each in threadpool_info()]
    given = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    return [*dict.fromkeys(found), ("set by you", ", ".join(given) or "nothing")]


def _library(info: dict[str, Any]) -> str:
    words = (info.get("internal_api") or info["user_api"], info.get("version"))
    return " ".join(str(word) for word in words if word)


def _caches() -> list[tuple[str, str]]:
    from dynamics.spectra.calibration import rates_path

    found = [("rates of processors", _file(rates_path()))]
    beside = sorted(Path().glob("*.cache"))
    found += [(f"spectra, {each}", _file(each)) for each in beside if each.is_file()]
    if not beside:
        found.append(("spectra", "no *.cache here; they lie beside outputs (OUTPUT.cache)"))
    return found


def _file(path: Path) -> str:
    if not path.exists():
        return f"{path}: none yet"
    size = path.stat().st_size / 1e6
    return f"{path}: {size:.1f} MB; clear it with: rm {shlex.quote(str(path))}"
