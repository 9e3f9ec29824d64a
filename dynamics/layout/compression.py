"""How the matrices of a recording are compressed."""

from dataclasses import dataclass
from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from dynamics.errors import DynamicsError

# name -> (the levels it has, the level taken here)
COMPRESSIONS: dict[str, tuple[range, int]] = {
    "blosc": (range(10), 1),
    "zstd": (range(-7, 23), 1),
    "none": (range(1), 0),
}
DEFAULT = "blosc"


@dataclass(frozen=True)
class Compression:
    """A compressor and its level.

    Args:
        name: "blosc" (zstd over the transposed bits of the numbers), "zstd" or "none".
        level: the compressor's; None for the default.

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
        levels, _ = COMPRESSIONS[self.name]
        if self.level is not None and self.level not in levels:
            raise DynamicsError(
                f"compression {self.name!r} has the levels {levels[0]} to {levels[-1]}; "
                f"found {self.level!r}."
            )

    def codecs(self) -> list[Any]:
        """What zarr's `compressors` takes: the compressor, then a checksum of its output."""
        level = COMPRESSIONS[self.name][1] if self.level is None else self.level
        if self.name == "none":
            return [Crc32cCodec()]
        if self.name == "zstd":
            return [ZstdCodec(level=level), Crc32cCodec()]
        return [BloscCodec(cname="zstd", clevel=level, shuffle="bitshuffle"), Crc32cCodec()]
