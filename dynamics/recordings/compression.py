"""How the matrices of a recording are compressed.

Trained weights and gradients of a 1.3 M-parameter model, one core, LZ4-1 and Zstandard-1 each over
bits transposed ("bit") or bytes ("byte"), as bytes / stored and speed:

              weights                gradients
    lz4 bit   1.14   1600 MB/s       1.26   1300 MB/s
    zstd bit  1.14    500 MB/s       1.28    430 MB/s
    zstd byte 1.08    540 MB/s       1.23    530 MB/s

Mantissas are noise. Only signs and exponents can be compressed, and transposed bits put them side
by side. LZ4 compresses them as well as Zstandard does, in a third of the time.
"""

from dataclasses import dataclass
from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec

from dynamics.errors import DynamicsError

DEFAULT, NONE = "lz4", "none"
COMPRESSIONS = (DEFAULT, "zstd", NONE)
_LEVELS = {DEFAULT: range(10), "zstd": range(10), NONE: range(1)}


@dataclass(frozen=True)
class Compression:
    """A compressor and its level.

    Args:
        name: "lz4" or "zstd" (both through Blosc, over transposed bits), or "none".
        level: 0 to 9; 1 by default.

    Raises:
        DynamicsError: an unknown name, or a level that the compressor does not have.
    """

    name: str = DEFAULT
    level: int | None = None

    def __post_init__(self) -> None:
        if self.name not in COMPRESSIONS:
            raise DynamicsError(
                f"compression takes one of {', '.join(COMPRESSIONS)}; found {self.name!r}."
            )
        levels = _LEVELS[self.name]
        whole = isinstance(self.level, int) and not isinstance(self.level, bool)
        if self.level is not None and not (whole and self.level in levels):
            raise DynamicsError(
                f"compression {self.name!r} has the levels {levels[0]} to {levels[-1]}; "
                f"found {self.level!r}."
            )

    def codecs(self) -> list[Any]:
        """The value of zarr's `compressors`: the compressor, then a checksum of its output."""
        if self.name == NONE:
            return [Crc32cCodec()]
        level = 1 if self.level is None else self.level
        name: Any = self.name
        return [BloscCodec(cname=name, clevel=level, shuffle="bitshuffle"), Crc32cCodec()]
