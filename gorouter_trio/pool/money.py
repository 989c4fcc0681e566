"""Arithmetic with US dollars: exact, whatever precision the program around has set for its own Decimals.

Sixty digits hold every sum of amounts below 10**12 dollars that are given to 10**-48.
"""

from __future__ import annotations

import decimal
from decimal import Decimal
from typing import Final

__all__ = ["ZERO", "add_usd", "divide_usd", "multiply_add_usd", "multiply_usd", "subtract_usd"]

ZERO: Final = Decimal(0)

_exact = decimal.Context(prec=60)
add_usd = _exact.add
"""The sum of two amounts."""
subtract_usd = _exact.subtract
"""The first amount less the second."""
multiply_usd = _exact.multiply
"""An amount so many times."""
multiply_add_usd = _exact.fma
"""The product of the first two, and the third added to it."""
divide_usd = _exact.divide_int
"""How many whole times the second amount goes into the first."""
