"""ComfyUI workflows in API format become job specs: `convert`.

The way is back from every SaveImage and PreviewImage to what its picture was made of, as values
(`values.py`); a job is put together of them (`assemble.py`), or the graph is refused by node and reason.
Nothing is approximated: what a job cannot say exactly is an error.
"""

from overpaint_producer.workflow.conversion import KINDS, Conversion, WorkflowJob, convert
from overpaint_producer.workflow.names import Names, parse_mapping

__all__ = ["KINDS", "Conversion", "Names", "WorkflowJob", "convert", "parse_mapping"]
