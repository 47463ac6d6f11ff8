"""The Celery app that Flower opens: `celery --app overpaint_producer.monitor flower`."""

from celery import Celery

from overpaint_shared.queues import make_app
from overpaint_shared.settings import Settings

app: Celery = make_app(Settings.load().redis_url)
