"""The oracle: what a port of Gemma computed, judged operation by operation against float64 with bounds.

Everything stands on the one `tap` of `refgemma.model.forward`: it records traces, and it forces another engine's trace
through the reference, so that each operation is judged on that engine's own inputs.
"""

from refgemma.oracle.compare import compare
from refgemma.oracle.diagnose import diagnose
from refgemma.oracle.diagnosis import Diagnosis
from refgemma.oracle.foreign import read_foreign
from refgemma.oracle.report import Report
from refgemma.oracle.trace import Trace, read_trace, trace
from refgemma.oracle.verdict import Finding

__all__ = ["Diagnosis", "Finding", "Report", "Trace", "compare", "diagnose", "read_foreign", "read_trace", "trace"]
