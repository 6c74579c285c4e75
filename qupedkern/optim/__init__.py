"""Optimizers of weights that live on learned centers."""

from . import schedules as schedules
from .quped import QuPeD as QuPeD
from .straight_through import StraightThrough as StraightThrough
