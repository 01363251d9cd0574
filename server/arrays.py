"""The array types that all rooms share; shapes are said where they are used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
State = dict[str, npt.NDArray[np.generic]]
"""The state tensors of one stream by name; stacks and histories are cut to their valid part."""
