"""Requests for the Gemma models of Cloudflare Workers AI, answered locally."""

from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.request import Request, read

__all__ = ["AI", "AiError", "Request", "read"]
