"""What producer and worker share: the job spec, the ledger, the queues, the store, the settings and the errors."""

__version__ = "0.1.0"
