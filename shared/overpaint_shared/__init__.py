"""What producer and worker share: the job spec, the ledger, queues, the store, settings and errors."""

__version__ = "0.1.0"
