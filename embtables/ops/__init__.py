"""The lookup and its fused optimisers, under ``torch.library``.

``embtables::lookup`` gathers rows and, in its backward, hands their gradient to ``embtables::update_``. ``reference``
gives both their meaning in plain PyTorch, wherever PyTorch runs. A native version registers further kernels for the
same two operators (``torch.library.register_kernel``) and has to match it. ``embtables::refuse_ids`` raises for ids out
of range inside compiled and exported graphs.
"""

from embtables.ops.ids import raise_for_ids, refuse_ids
from embtables.ops.reference import coalesce, fused_dense, fused_lookup, update

__all__ = ["coalesce", "fused_dense", "fused_lookup", "raise_for_ids", "refuse_ids", "update"]
