"""Where lut_linear stops reading codes: the weight is written out once, in scratch, and multiplied by torch."""

from __future__ import annotations

import torch

# Rows of x from which on, by its type. Estimates from bytes and rates: not measured yet.
WRITTEN_OUT = {torch.bfloat16: 768, torch.float16: 768, torch.float32: 128}
