"""transformers' own way to an adapter, for tests that go it.

A transformers may refuse every PEFT that there is: 5.24.0 asks for 0.22, of which no release
exists. Nobody can then load an adapter that way, whatever its type, and tests of it are skipped
with that reason; they run with an older transformers, down to the lowest one.
"""

from __future__ import annotations

import peft
import pytest
from packaging.version import Version

try:
    from transformers.integrations.peft import MIN_PEFT_VERSION
except ImportError:  # older ones do not say
    MIN_PEFT_VERSION = "0"

TAKES_ADAPTERS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)
_REASON = f"this transformers takes adapters of PEFT {MIN_PEFT_VERSION} only"

# For a test that goes this way alone.
natively = pytest.mark.skipif(not TAKES_ADAPTERS, reason=_REASON)
