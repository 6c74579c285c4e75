"""Neural networks on a handful of learned weight values: QuPeD training, packed storage, fast kernels.

    import qupedkern as qk

Importing this touches no GPU and loads neither Triton nor native code.
"""

from . import nn as nn
from . import optim as optim
from ._version import __version__ as __version__
from .backends import batch_invariant as batch_invariant
from .backends import use_backend as use_backend
from .explain import backends as backends
from .explain import explain as explain
from .files import FileError as FileError
from .files import load as load
from .files import load_ as load_
from .files import save as save
from .nn import mode as mode
from .nn import pack_ as pack_
from .nn import quantize_ as quantize_
from .nn import quantize_weights_ as quantize_weights_
from .nn import recalibrate_ as recalibrate_
from .nn import squared_gradients as squared_gradients
from .nn import summary as summary
from .nn import unpack_ as unpack_
from .ops import assign as assign
from .ops import center_step as center_step
from .ops import dequantize as dequantize
from .ops import dequantize_packed as dequantize_packed
from .ops import distance as distance
from .ops import distillation_loss as distillation_loss
from .ops import foreach_soft_quantize as foreach_soft_quantize
from .ops import hard_quantize as hard_quantize
from .ops import init_centers as init_centers
from .ops import lut_linear as lut_linear
from .ops import pack_codes as pack_codes
from .ops import packed_embedding as packed_embedding
from .ops import prox_centers as prox_centers
from .ops import prox_weights as prox_weights
from .ops import quped_step as quped_step
from .ops import soft_quantize as soft_quantize
from .ops import unpack_codes as unpack_codes
from .optim import QuPeD as QuPeD
from .optim import StraightThrough as StraightThrough
