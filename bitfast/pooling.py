"""The max-pool of the stem."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from bitfast.change_notifier import ChangeNotifier
from bitfast.layers import DynamicPad2d, pair_of
from bitfast.ops.same_padding import max_pool_for, same_max_pool
from bitfast.torch_state import is_concrete
from bitfast.watching import is_plain, runs_as_written

torch.fx.wrap("same_max_pool")  # torch.fx takes it whole: it looks at shapes and dtypes


class MaxPool2d(ChangeNotifier, nn.MaxPool2d):
    """Max-pool whose padding takes part in the maximum.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: As in ``torch.nn.MaxPool2d``.
        padding_value: What TensorFlow's "same" padding holds.
        use_dynamic_padding: Whether the input gets TensorFlow's "same" padding, which depends on its size.
    """

    pad: nn.Module | None

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        padding_value: float = 0,
        use_dynamic_padding: bool = True,
    ) -> None:
        kernel_size, dilation = pair_of(kernel_size), pair_of(dilation)
        stride = kernel_size if stride is None else pair_of(stride)
        super().__init__(kernel_size, stride, pair_of(padding), dilation, return_indices, ceil_mode)
        self.pad = (
            DynamicPad2d(kernel_size, stride, dilation, padding_value)
            if use_dynamic_padding
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H', W')."""
        return self.with_zeros(x, 0)

    def with_zeros(self, x: Tensor, zeros: int) -> Tensor:
        """Pad x with ``zeros`` zeros on each of its four sides, then do what :meth:`forward` does."""
        pad = self.pad
        if not self.is_fused() or (is_concrete(x) and x.dim() != 4):
            x = F.pad(x, (zeros,) * 4) if zeros else x
            return super().forward(x if pad is None else pad(x))
        window = self.kernel_size, self.stride, self.dilation
        if not isinstance(pad, DynamicPad2d):
            return same_max_pool(x, *window, padding=(zeros,) * 4)
        x = F.pad(x, (zeros,) * 4) if zeros else x
        return same_max_pool(x, *window, padding="same", value=pad.value)

    def prepared(
        self, shape: tuple[int, ...], zeros: int, device_type: str, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """Return a function that does what :meth:`with_zeros` does, for tensors of this shape and type.

        The backend is chosen once. :meth:`is_fused` must be true, and no gradient be recorded at its calls.

        Raises:
            ValueError: the window is larger than the padded input.
        """
        pad, sides = self.pad, (zeros,) * 4
        window = pair_of(self.kernel_size), pair_of(self.stride), pair_of(self.dilation)
        if not isinstance(pad, DynamicPad2d):
            return max_pool_for(shape, window, sides, 0.0, device_type, dtype)
        padded = (*shape[:2], *(n + 2 * zeros for n in shape[2:]))
        pool = max_pool_for(padded, window, None, pad.value, device_type, dtype)
        return (lambda x: pool(F.pad(x, sides))) if zeros else pool

    def is_fused(self) -> bool:
        """Whether one op may pad and pool: nobody watches the padding, and the settings are BiT's."""
        return (
            self._pads_for_its_window()
            and pair_of(self.padding) == (0, 0)
            and not self.ceil_mode
            and not self.return_indices
        )

    def _pads_for_its_window(self) -> bool:
        pad = self.pad
        if pad is None:
            return not is_fx_symbolic_tracing()
        if not runs_as_written(pad):
            return False
        if type(pad) is nn.Identity:
            return True
        window = self.kernel_size, self.stride, self.dilation
        return is_plain(pad, DynamicPad2d) and (pad.kernel_size, pad.stride, pad.dilation) == window


__all__ = ["MaxPool2d"]
