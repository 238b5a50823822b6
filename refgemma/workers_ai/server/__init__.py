"""The hosted models' HTTP interface, served from this machine (extra ``serve``)."""

from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.service import Service
from refgemma.workers_ai.server.start import greeting, hosts_of, serve, state

__all__ = ["Service", "create_app", "greeting", "hosts_of", "serve", "state"]
