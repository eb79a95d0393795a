"""Between jagged rows and padded rows, in plain torch.

Shape suffixes: B requests; N rows of all requests together; S rows of the longest request (1 at least);
D any trailing dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """Where each row of a jagged tensor stands in its padded form; worked out once, used by every layer.

    Args:
        lengths_B: int64 [B], rows of each request.

    Example::

        padding = Padding(torch.tensor([2, 0, 1]))
        padded_BSD = padding.pad(torch.randn(3, 8))  # [3, 2, 8], zeros where there is no row
        rows_ND = padding.unpad(padded_BSD)
    """

    def __init__(self, lengths_B: Tensor) -> None:
        self.num_requests = lengths_B.numel()
        self.max_length = max(1, int(lengths_B.max())) if self.num_requests else 1
        positions_S = torch.arange(self.max_length, device=lengths_B.device)
        self.mask_BS = positions_S < lengths_B[:, None]
        self.is_dense = bool(self.mask_BS.all())
        self._rows_N = None if self.is_dense else self.mask_BS.flatten().nonzero().squeeze(1)
        # An empty request attends to padding, whose value is zero, so that its softmax is over something.
        self._attendable_BS = self.mask_BS | (lengths_B == 0)[:, None]

    def pad(self, rows_ND: Tensor) -> Tensor:
        """[N, D] to [B, S, D], zeros where there is no row."""
        trailing = rows_ND.shape[1:]
        if self._rows_N is None:
            return rows_ND.view(self.num_requests, self.max_length, *trailing)
        padded_PD = rows_ND.new_zeros(self.num_requests * self.max_length, *trailing)
        return padded_PD.index_copy(0, self._rows_N, rows_ND).view(self.num_requests, self.max_length, *trailing)

    def unpad(self, padded_BSD: Tensor) -> Tensor:
        """[B, S, D] to [N, D]: what `pad` was given."""
        rows_PD = padded_BSD.flatten(0, 1)
        return rows_PD if self._rows_N is None else rows_PD.index_select(0, self._rows_N)

    def key_mask(self) -> Tensor | None:
        """bool [B, 1, 1, S], the keys that may be attended to; None where all may."""
        return None if self.is_dense else self._attendable_BS[:, None, None, :]
