"""`overpaint doctor`: looks at a live farm, and tells what endangers it and what to do.

Facts are gathered first (`*_facts.py`), each kind in a thread with a time limit, with whatever rights the
settings give. Checks (`check_*.py`) are pure functions over those facts.
"""

from overpaint_producer.doctor.examination import Examination, examine
from overpaint_producer.doctor.findings import Finding, Level

__all__ = ["Examination", "Finding", "Level", "examine"]
