"""Layers whose weights live on a few learned values, and what turns a model's layers into them and back."""

from ._packed import PackedLayer as PackedLayer
from ._packed import packed_layers as packed_layers
from ._quantized import QuantizedLayer as QuantizedLayer
from ._quantized import WeightMode as WeightMode
from ._quantized import absolute_sharpness as absolute_sharpness
from ._quantized import mode as mode
from ._quantized import quantized_layers as quantized_layers
from ._quantized import row_gaps as row_gaps
from .conv import PackedConv1d as PackedConv1d
from .conv import PackedConv2d as PackedConv2d
from .conv import QuantConv1d as QuantConv1d
from .conv import QuantConv2d as QuantConv2d
from .convert import Conversion as Conversion
from .convert import pack_ as pack_
from .convert import quantize_ as quantize_
from .convert import unpack_ as unpack_
from .kinds import KINDS as KINDS
from .kinds import Kind as Kind
from .kinds import kind_of as kind_of
from .linear import PackedLinear as PackedLinear
from .linear import QuantLinear as QuantLinear
from .recalibrate import Recalibration as Recalibration
from .recalibrate import recalibrate_ as recalibrate_
from .summary import Summary as Summary
from .summary import summary as summary
