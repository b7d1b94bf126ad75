"""Send about 1 % of the gradients: exact Top-K sparsification with error feedback for DDP.

model = DistributedDataParallel(net)
state = TopKEFState(density=0.01)
model.register_comm_hook(state, topk_ef_hook)
"""

import sys as _sys

try:
    from . import (
        _native as _native,
    )  # first: it says in one line what is wrong with torch or the build
except ImportError:
    # `python -m compressed_ddp.info` imports this package before it can report why that fails.
    if _sys.argv[:1] == ["-m"] and "compressed_ddp.info" in _sys.orig_argv:
        from . import info as _info

        _sys.exit(_info.main())
    raise

from . import ops as ops
from ._build_info import PACKAGE_VERSION as __version__  # noqa: F401
from .adam import adam_param_groups
from .all_reduce import all_reduce_, all_reduce_gradients
from .auto_exchange import AutoExchange, ExchangeCosts
from .compressor import ErrorFeedbackBuffer, TopKCompressor
from .hook import register, topk_ef_hook
from .state import TopKEFState

__all__ = [
    "AutoExchange",
    "ErrorFeedbackBuffer",
    "ExchangeCosts",
    "TopKCompressor",
    "TopKEFState",
    "adam_param_groups",
    "all_reduce_",
    "all_reduce_gradients",
    "register",
    "topk_ef_hook",
]
