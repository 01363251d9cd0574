"""Array types that all packages of the server share. The code that uses them names the shapes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
State = dict[str, npt.NDArray[np.generic]]
"""State tensors of one stream by name; stacks and histories hold only their valid part."""
