"""What becomes of a per-sample tensor where Python wants a number, a string, an array, or the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from per_sample._errors import DataDependentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable


class Conversions(torch.Tensor):
    """The methods of a tensor that leave torch: right where all samples have the same value, refused elsewhere."""

    # ``x.value_of(what)``: the one value, or the refusal of ``what``. Set where values are looked at.
    value_of: ClassVar[Callable[..., Tensor]]

    def tolist(self) -> Any:
        """The numbers, where all samples have the same."""
        return self.value_of("`tolist`").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As ``tolist``, as an array."""
        return self._checked(force).value_of("`numpy`").numpy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked().value_of("Conversion to an array").__array__(*args, **kwargs)

    def _checked(self, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self

    @property
    def data(self) -> Tensor:
        """As torch has it."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is self:
            return
        raise UnsupportedError("Assigning to `.data` of a per-sample tensor is not supported; use `copy_`, or a new variable.")

    def __copy__(self) -> Tensor:
        return self.view_as(self)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __format__(self, spec: str) -> str:
        """A number, as torch has it; where the samples differ, one that is only shown (no format is asked for) shows as what it is."""
        if self.dim():
            return object.__format__(self, spec)
        try:
            return format(self.value_of("A formatted number").item(), spec)
        except DataDependentError:
            if spec:
                raise
            return repr(self)

    def _outside(self, *_: Any, **__: Any) -> NoReturn:
        raise DataDependentError(
            "A per-sample tensor cannot be stored or handed to other libraries inside the function. Return it with `has_aux=True`."
        )

    __reduce_ex__ = __dlpack__ = data_ptr = apply_ = map_ = map2_ = _outside
