"""The public ops. OPS[name] has what lies behind each: schema, reference, allocate, prepare."""

from ._define import OPS as OPS
from .assign import assign as assign
from .center_step import center_step as center_step
from .dequantize import dequantize as dequantize
from .dequantize_packed import dequantize_packed as dequantize_packed
from .distance import distance as distance
from .distillation_loss import distillation_loss as distillation_loss
from .foreach_soft_quantize import foreach_soft_quantize as foreach_soft_quantize
from .hard_quantize import hard_quantize as hard_quantize
from .init_centers import init_centers as init_centers
from .lut_linear import lut_linear as lut_linear
from .pack_codes import pack_codes as pack_codes
from .packed_embedding import packed_embedding as packed_embedding
from .prox_centers import prox_centers as prox_centers
from .prox_weights import prox_weights as prox_weights
from .quped_step import quped_step as quped_step
from .soft_quantize import soft_quantize as soft_quantize
from .unpack_codes import unpack_codes as unpack_codes
