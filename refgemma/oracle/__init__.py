"""The oracle: what a port of Gemma computed, judged operation by operation against float64 with bounds.

Everything builds on the one `tap` of `refgemma.model.forward`: it records traces, and it forces another engine's trace
through the reference, so that each operation is judged on that engine's own inputs. `THEORY.md` derives the bounds.
"""

from refgemma.oracle.compare import compare
from refgemma.oracle.diagnose import diagnose
from refgemma.oracle.diagnosis.result import Diagnosis
from refgemma.oracle.foreign.reader import read_foreign
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.models import read_trace
from refgemma.oracle.report import Report
from refgemma.oracle.traces.recording import trace
from refgemma.oracle.traces.trace import Trace

__all__ = ["Diagnosis", "Finding", "Report", "Trace", "compare", "diagnose", "read_foreign", "read_trace", "trace"]
