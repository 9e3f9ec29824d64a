"""The stored tensors that belong to one quantised weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynamics.formats.quantised.codes import Codes
from dynamics.formats.quantised.config import Said
from dynamics.formats.quantised.tensor import Arrays, NotDequantised, QuantisedTensor
from dynamics.formats.storage.tensors import Tensor

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Parts:
    """What is stored of one quantised weight.

    Attributes:
        name: the name that the weight has where it is not quantised.
        stored: suffix -> tensor.
        said: what the model's config says.
        detail: what the key told besides: "nf4".
    """

    name: str
    stored: Mapping[str, Tensor]
    said: Said
    detail: str = ""

    def get(self, suffix: str, *dtypes: str) -> Tensor:
        """One part.

        Raises:
            NotDequantised: it is missing, or has a dtype besides these.
        """
        tensor = self.stored.get(suffix)
        if tensor is None:
            raise NotDequantised(f"its {suffix.strip('._')} is missing")
        if dtypes and tensor.dtype not in dtypes:
            raise NotDequantised(f"its {suffix.strip('._') or 'codes'} is {tensor.dtype}")
        return tensor

    def tensor(
        self,
        shape: tuple[int, ...],
        scheme: str,
        decode: Callable[[Arrays], Codes],
        **roles: Tensor | None,
    ) -> QuantisedTensor:
        """The quantised tensor that `decode` makes of these parts."""
        stored = {role: each for role, each in roles.items() if each is not None}
        return QuantisedTensor(self.name, shape, self.said.dtype, stored, scheme, decode)
