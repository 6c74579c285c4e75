"""Packed models in safetensors files: save, load, load_. No pickle; everything is validated before anything is built."""

from .atomic import write_atomically as write_atomically
from .errors import FileError as FileError
from .load import load as load
from .load import load_ as load_
from .save import save as save
